// SPDX-License-Identifier: GPL-2.0
//! Scenario 6: the guest has no driver for the VF, and gets it later.

use super::guest::{Boot, Nic};
use super::traffic::{Iperf, Link};
use super::vf::{bonded, paths, slave};
use super::{ensure, Context, Result};

pub fn run(context: &mut Context<'_>) -> Result<()> {
    let lab = context.lab();
    let boot = Boot {
        append: "lab.without=mana".into(),
        ..Boot::new(vec![Nic::with_vf(0)])
    };
    let mut guest = context.boot(&boot)?;
    let nic = guest.nics[0].clone();
    guest.peer_server(lab, &nic, &["iperf3", "-s"])?;
    let link = Link::new(&guest, lab, &nic);
    context.check(
        "the VF's PCI device is there, and nothing drives it",
        || {
            guest.wait_until(
                "lspci -D -n -d 1414:00ba | grep -q .",
                std::time::Duration::from_secs(30),
            )?;
            let text = guest.sh("lspci -n -k -d 1414:00ba")?;
            ensure(!text.contains("in use"), || text.clone())?;
            let text = guest.sh("ls /sys/class/net")?;
            ensure(!text.contains("enP"), || text)
        },
    );
    context.check("ping over IPv4 and IPv6", || link.pings());
    for reverse in [false, true] {
        let way = if reverse { "to" } else { "from" };
        context.check(&format!("iperf3 TCP over IPv4 {way} the guest"), || {
            link.iperf(Iperf {
                udp: false,
                v6: false,
                reverse,
                seconds: 2,
            })
            .map(drop)
        });
    }
    context.check("the host carried it by the synthetic path", || {
        let paths = paths(&guest, &nic)?;
        ensure(
            paths.vf_tx == 0 && paths.vf_rx == 0 && paths.synthetic_tx > 100,
            || format!("{paths:?}"),
        )
    });
    context.check("once installed, mana bonds without a reboot", || {
        guest.sh("mkdir -p /lib/modules/$(uname -r)/extra && mv /root/mana.ko /lib/modules/$(uname -r)/extra/ && depmod -a && modprobe mana")?;
        bonded(&guest, &nic)?;
        slave(&guest, &nic)?;
        link.pings()
    });
    context.finish(guest)
}
