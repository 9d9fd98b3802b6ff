// SPDX-License-Identifier: GPL-2.0

//! Functions come and go.
//!
//! The host says which functions are on the bus ("bus relations"), again whenever that changes,
//! and asks for single functions back ("eject"). All of it is done by one work item on the bus's
//! ordered queue.

use hyperv_wire::vpci::Function;
use kernel::{
    prelude::*,
    str::CString,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};
use pci_host::{
    RescanLock,
    RootBus, //
};

use crate::bus::{
    Bus,
    Child,
    State, //
};

impl Bus {
    /// Acts on what the host has said since the last time.
    pub(crate) fn handle_events(&self) {
        let (relations, ejects) = self.take_events();
        let state = self.state.lock();
        if let State::Suspended(..) = &*state {
            // The PCI core has to wake up first.
            let surveyed = relations.is_some();
            self.put_back(relations, ejects);
            if surveyed {
                self.surveyed.complete();
            }
            return;
        }
        if let Some(functions) = relations {
            match self.update_children(&state, &functions) {
                Ok(true) if matches!(&*state, State::Probing) => self.surveyed.complete(),
                // Whoever probes has waited as long, and gives up.
                Ok(_) => {}
                Err(_) => dev_err!(self.log(), "couldn't follow the bus relations\n"),
            }
        }
        for child in &ejects {
            self.eject(&state, child);
        }
    }

    /// Makes the functions on the bus those which the host lists. Tells whether the host has
    /// answered all questions about them.
    fn update_children(&self, state: &State, functions: &[Function]) -> Result<bool> {
        let current = self.all_children()?;
        let mut next: KVec<Arc<Child>> = KVec::with_capacity(functions.len(), GFP_KERNEL)?;
        let mut new = KVec::new();
        let mut unanswered = false;

        for function in functions {
            if let Some(other) = next.iter().find(|c| c.function.slot == function.slot) {
                if !is_same(&other.function, function) {
                    dev_err!(self.log(), "two functions in slot {:?}\n", function.slot);
                }
                continue;
            }
            let child = match current.iter().find(|c| is_same(&c.function, function)) {
                Some(child) => child.clone(),
                None if unanswered => continue,
                None => match self.add_child(*function) {
                    Ok(child) => {
                        new.push(child.clone(), GFP_KERNEL)?;
                        child
                    }
                    Err(e) => {
                        dev_err!(self.log(), "couldn't record a child device.\n");
                        // A host that does not answer would be waited for again and again.
                        unanswered |= e == ETIMEDOUT || e == ENODEV;
                        continue;
                    }
                },
            };
            next.push(child, GFP_KERNEL)?;
        }

        // Take those away that are not listed any more.
        for child in &current {
            if !next.iter().any(|c| Arc::ptr_eq(c, child)) {
                child.gone.store(true, Relaxed);
                self.remove_child_device(state, child);
            }
        }
        let old = core::mem::replace(&mut *self.children.lock(), next);
        drop(old);

        if let State::Installed(root, _) = state {
            self.announce(root, &new);
        }
        Ok(!unanswered)
    }

    fn add_child(&self, function: Function) -> Result<Arc<Child>> {
        Child::new(function, self.query_bars(function.slot)?)
    }

    /// Lets the PCI core find new functions on a bus that it knows already.
    fn announce(&self, root: &RootBus<Bus>, new: &[Arc<Child>]) {
        for child in new {
            if let Err(e) = self.report_assigned(child) {
                dev_err!(
                    self.log(),
                    "new function in slot {:?}: {}\n",
                    child.function.slot,
                    e.to_errno()
                );
                if e == ETIMEDOUT || e == ENODEV {
                    break;
                }
            }
        }
        let lock = RescanLock::new();
        root.rescan(&lock);
        self.set_numa_nodes(root, &lock);
        root.assign_resources(&lock);
        self.create_slots(root);
        root.add_devices(&lock);
    }

    /// Tells the PCI core near which memory the functions are.
    pub(crate) fn set_numa_nodes(&self, root: &RootBus<Bus>, lock: &RescanLock) {
        root.set_numa_nodes(lock, |devfn| {
            let slot = hyperv_wire::vpci::SlotNumber::from_devfn(devfn);
            self.child(slot)?.function.numa_node
        });
    }

    /// Makes the functions' slots appear in sysfs, named by serial number.
    ///
    /// That is how a network interface finds its VF.
    pub(crate) fn create_slots(&self, root: &RootBus<Bus>) {
        let Ok(children) = self.all_children() else {
            return;
        };
        for child in &children {
            let mut slot = child.slot.lock();
            if slot.is_some() {
                continue;
            }
            let serial = child.function.serial;
            let created = CString::try_from_fmt(fmt!("{}", serial))
                .and_then(|name| root.create_slot(child.function.slot.device(), &name));
            match created {
                Ok(created) => *slot = Some(created),
                Err(_) => pr_warn!("pci_create slot {} failed\n", serial),
            }
        }
    }

    /// Removes the entries of all functions in sysfs.
    pub(crate) fn remove_slots(&self) {
        for child in self.all_children().iter().flatten() {
            drop(child.slot.lock().take());
        }
    }

    /// Takes the function from the PCI core.
    fn remove_child_device(&self, state: &State, child: &Child) {
        if let State::Installed(root, _) = state {
            let lock = RescanLock::new();
            root.remove_device(&lock, child.function.slot.devfn());
        }
        drop(child.slot.lock().take());
    }

    /// Gives a function back that the host wants.
    fn eject(&self, state: &State, child: &Arc<Child>) {
        let current = self.all_children();
        let is_child = |c: &Arc<Child>| Arc::ptr_eq(c, child);
        // It may be gone already, because the bus relations do not list it any more; the host
        // waits for the answer nevertheless.
        if current.iter().flatten().any(is_child) {
            self.remove_child_device(state, child);
            self.children.lock().retain(|c| !is_child(c));
        }
        self.report_ejected(child.function.slot);
    }
}

/// Whether two descriptions are about the same function in the same place.
pub(crate) fn is_same(a: &Function, b: &Function) -> bool {
    (a.slot, a.vendor, a.device, a.serial) == (b.slot, b.vendor, b.device, b.serial)
}
