// SPDX-License-Identifier: GPL-2.0

//! Text files in debugfs.
//!
//! Those of the `kernel` crate do not keep their module loaded while they are open.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use core::{
    marker::PhantomPinned,
    pin::Pin, //
};

use hyperv_bindings as bindings;
use kernel::{
    prelude::*,
    seq_file::SeqFile,
    str::CStr, //
};

/// A folder. Dropping it removes it with all that is in it.
///
/// There is none when debugfs is not there; nothing can be seen then, and that is all.
pub struct Dir(*mut bindings::dentry);

// SAFETY: A folder can be used and removed by any thread.
unsafe impl Send for Dir {}

// SAFETY: See above.
unsafe impl Sync for Dir {}

impl Dir {
    /// Makes a folder in `parent`, or at the top. Sleeps.
    pub fn new(name: &CStr, parent: Option<&Dir>) -> Self {
        let parent = parent.map_or(core::ptr::null_mut(), |dir| dir.0);
        // SAFETY: The name is a string, and the parent is null, an error or a folder of ours: the
        // function takes all of them.
        Self(unsafe { bindings::debugfs_create_dir(name.as_char_ptr(), parent) })
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: The pointer is what creating the folder returned, errors included.
        unsafe { bindings::debugfs_remove(self.0) };
    }
}

/// What a file shows.
pub trait Show: Send + Sync + 'static {
    /// Writes the text. May sleep.
    fn show(&self, to: &SeqFile);
}

/// A file that shows `T`. Dropping it removes it, and waits for those who are reading it.
#[pin_data(PinnedDrop)]
pub struct File<T: Show> {
    raw: bindings::hyperv_debugfs_file,
    dentry: *mut bindings::dentry,
    data: T,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: A file can be removed by any thread.
unsafe impl<T: Show> Send for File<T> {}

// SAFETY: Nothing can be done with a shared reference.
unsafe impl<T: Show> Sync for File<T> {}

impl<T: Show> File<T> {
    /// Makes a file in `dir`, which root can read. Sleeps.
    pub fn new<'a>(dir: &'a Dir, name: &'a CStr, data: T) -> impl PinInit<Self, Error> + 'a
    where
        T: 'a,
    {
        let init = try_pin_init!(Self {
            raw: bindings::hyperv_debugfs_file {
                show: Some(Self::callback),
            },
            dentry: core::ptr::null_mut(),
            data,
            _pin: PhantomPinned,
        }? Error);
        init.pin_chain(|this| {
            let context: *const Self = &raw const *this;
            // SAFETY: The structure stays where it is until it is dropped, which removes the file
            // and waits for its readers. The operations find `raw` at its address.
            let dentry = unsafe {
                bindings::hyperv_debugfs_create_file(
                    name.as_char_ptr(),
                    dir.0,
                    (&raw const (*context).raw).cast_mut(),
                )
            };
            // SAFETY: Nothing is moved.
            unsafe { this.get_unchecked_mut().dentry = dentry };
            Ok(())
        })
    }

    /// # Safety
    ///
    /// Only the operations of the file call this, with the `raw` of a `File<T>` that lives
    /// meanwhile.
    unsafe extern "C" fn callback(
        raw: *const bindings::hyperv_debugfs_file,
        to: *mut bindings::seq_file,
    ) {
        // SAFETY: By the safety requirements.
        let (this, to) = unsafe {
            (
                &*raw
                    .byte_sub(core::mem::offset_of!(Self, raw))
                    .cast::<Self>(),
                SeqFile::from_raw(to),
            )
        };
        this.data.show(to);
    }
}

#[pinned_drop]
impl<T: Show> PinnedDrop for File<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The pointer is what creating the file returned, errors included.
        unsafe { bindings::debugfs_remove(self.dentry) };
    }
}
