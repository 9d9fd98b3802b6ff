// SPDX-License-Identifier: GPL-2.0

//! XDP: a program sees each frame before the stack does.
//!
//! The program belongs to the device and not to its connection to the host. The VF gets it as well,
//! since most frames come by the VF when there is one.
//!
//! A frame for the program is copied out of the receive buffer to a page of the channel's pool,
//! where it stays when it becomes a packet. What the program sends back is collected while a
//! channel is polled and transmitted together.

use kernel::{
    cpu::CpuId,
    prelude::*,
    sync::{
        aref::ARef,
        rcu, //
    }, //
};
use net::{
    eopnotsupp,
    netdev_err,
    netdev_info,
    xdp::{
        buffer_size,
        Frame,
        Frames,
        Program,
        Verdict,
        FRAME_MAX, //
    },
    Device,
    ExtAck,
    Features,
    NetDevice,
    PollContext,
    Rtnl,
    SkBuff,
    TxQueue,
    Xdp,
    Xmit, //
};

use crate::{
    device,
    device::Netvsc,
    stats::QueueStats,
    tx, //
};

impl Xdp for Netvsc {
    fn set_program(
        dev: &Device<Self>,
        program: Option<&Program>,
        extack: &mut ExtAck<'_>,
        rtnl: &Rtnl,
    ) -> Result {
        let data = dev.data();
        if program.is_none() && data.program.is_empty() {
            return Ok(());
        }
        if program.is_some() {
            data.connected()?;
            check_mtu(dev, dev.mtu())
                .inspect_err(|_| extack.set(c"hv_netvsc: XDP: mtu too large"))?;
            if dev.features().contains(Features::LRO) {
                netdev_err!(dev, "XDP: not support LRO\n");
                extack.set(c"hv_netvsc: XDP: not support LRO");
                return Err(eopnotsupp());
            }
        }
        // The VF is asked first: it is the one that can fail.
        if let Some(vf) = data.bond.vf.get() {
            vf.with_ops_lock(rtnl, || set_on_vf(dev, &vf, program, rtnl))
                .inspect_err(|_| extack.set(c"hv_netvsc: vf_setxdp failed"))?;
        }
        data.program.replace(program.map(ARef::from));
        Ok(())
    }

    fn xmit_frames(dev: &Device<Self>, frames: &mut Frames<'_>) -> Result {
        let data = dev.data();
        let guard = rcu::read_lock();
        if data.shared.borrow(&guard).is_none() {
            return Ok(());
        }
        if let Some(vf) = device::vf_in_use(dev, &guard) {
            match frames.transmit_on(vf, &guard) {
                // It takes packets.
                Err(e) if e == eopnotsupp() => {}
                other => return other,
            }
        }
        let queue = CpuId::current()
            .as_u32()
            .checked_rem(dev.num_tx_queues())
            .unwrap_or(0) as u16;
        dev.with_tx_queue(queue, |queue| {
            transmit_all(dev, queue, &guard, || {
                let skb = frames.take(dev)?;
                Some((skb, frames.left() != 0))
            });
        });
        if let Some(stats) = data.statistics.queues.get(usize::from(queue)) {
            stats.xdp_xmit.add(frames.taken() as u64);
        }
        Ok(())
    }
}

/// Checks that frames for this MTU fit into a buffer.
fn check_mtu(dev: &Device<Netvsc>, mtu: u32) -> Result {
    let (size, max) = buffer_size(mtu.saturating_add(net::ETH_HLEN));
    if size > max {
        netdev_err!(dev, "XDP: mtu:{} too large, buf_max:{}\n", mtu, size);
        return Err(eopnotsupp());
    }
    Ok(())
}

/// Checks whether the device can have this MTU, with the program that it has.
pub(crate) fn check_new_mtu(dev: &Device<Netvsc>, mtu: u32) -> Result {
    if dev.data().program.is_empty() {
        return Ok(());
    }
    check_mtu(dev, mtu)
}

/// Takes out the features that do not go together with a program.
pub(crate) fn fix_features(dev: &Device<Netvsc>, features: Features) -> Features {
    if features.contains(Features::LRO) && !dev.data().program.is_empty() {
        netdev_info!(dev, "Skip LRO - unsupported with XDP\n");
        return features & !Features::LRO;
    }
    features
}

/// Sets the program of the VF, whose own lock is held. One whose driver knows no XDP gets none.
fn set_on_vf(
    dev: &Device<Netvsc>,
    vf: &NetDevice,
    program: Option<&Program>,
    rtnl: &Rtnl,
) -> Result {
    if !vf.has_xdp() {
        return Ok(());
    }
    vf.set_xdp_program(program, rtnl)
        .inspect_err(|e| netdev_err!(dev, "vf_setxdp failed:{}\n", e.to_errno()))
}

/// A VF, whose own lock is held, has joined: it gets the program that there is.
pub(crate) fn vf_joined(dev: &Device<Netvsc>, vf: &NetDevice, rtnl: &Rtnl) {
    if let Some(program) = dev.data().program.get() {
        // A VF that has failed here still is better than none.
        let _ = set_on_vf(dev, vf, Some(&program), rtnl);
    }
}

/// The VF leaves, and the program does not stay there.
pub(crate) fn vf_leaves(dev: &Device<Netvsc>, vf: &NetDevice, rtnl: &Rtnl) {
    if !dev.data().program.is_empty() {
        // What has failed is in the log.
        let _ = vf.with_ops_lock(rtnl, || set_on_vf(dev, vf, None, rtnl));
    }
}

/// What became of a received frame.
pub(crate) enum Outcome {
    /// A packet for the stack.
    Pass(SkBuff),
    /// A packet to be sent back.
    Transmit(SkBuff),
    /// Nothing is left.
    Gone,
}

/// Runs the program on a frame of `len` bytes, which `fill` copies, and counts what it decides.
pub(crate) fn run(
    context: &PollContext<'_, Netvsc>,
    program: &Program,
    stats: &QueueStats,
    len: u32,
    guard: &rcu::Guard,
    fill: impl FnOnce(&mut Frame<'_>) -> Result,
) -> Result<Outcome> {
    let frame = if len <= FRAME_MAX {
        context.frame()
    } else {
        None
    };
    let Some(mut frame) = frame else {
        stats.xdp_drop.add(1);
        return Ok(Outcome::Gone);
    };
    fill(&mut frame)?;
    let counter = match frame.run(program, guard) {
        Verdict::Pass(frame) => return Ok(Outcome::Pass(frame.into_skb().ok_or(ENOMEM)?)),
        Verdict::Transmit(frame) => return Ok(Outcome::Transmit(frame.into_skb().ok_or(ENOMEM)?)),
        Verdict::Redirected => &stats.xdp_redirect,
        Verdict::Dropped => &stats.xdp_drop,
    };
    counter.add(1);
    // What a program has taken was received as well.
    stats.rx_packets.add(1);
    stats.rx_bytes.add(len.into());
    Ok(Outcome::Gone)
}

/// Sends received packets back, and empties the list.
pub(crate) fn send_back(
    dev: &Device<Netvsc>,
    queue: u16,
    packets: &mut KVec<SkBuff>,
    guard: &rcu::Guard,
) {
    let mut left = packets.len();
    let mut packets = packets.drain_all();
    dev.with_tx_queue(queue, |queue| {
        transmit_all(dev, queue, guard, || {
            let skb = packets.next()?;
            left -= 1;
            Some((skb, left != 0))
        });
    });
    // Those for which there was no room.
    dev.data().statistics.tx_dropped.add(packets.count() as u64);
}

/// Transmits packets without their Ethernet headers, until there are no more or no room. `next`
/// also tells whether another one will follow.
fn transmit_all(
    dev: &Device<Netvsc>,
    queue: &mut TxQueue<'_>,
    guard: &rcu::Guard,
    mut next: impl FnMut() -> Option<(SkBuff, bool)>,
) {
    let data = dev.data();
    while !queue.is_stopped() {
        let Some((mut skb, more)) = next() else {
            break;
        };
        if skb.turn_round(queue.index()).is_err() {
            data.statistics.tx_dropped.add(1);
            continue;
        }
        if skb.raw_hash() == 0 {
            device::tx_hash(data, &mut skb);
        }
        queue.set_more(more);
        if matches!(device::xmit(dev, queue, skb, guard), Xmit::Busy(_)) {
            // There is nobody to try again.
            data.statistics.tx_dropped.add(1);
        }
    }
    // The last one may have been expected in vain.
    if let Some(shared) = data.shared.borrow(guard) {
        tx::flush(dev, shared, queue, guard);
    }
}
