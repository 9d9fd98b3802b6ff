// SPDX-License-Identifier: GPL-2.0

//! What `kernel::bindings` lacks for the VMBus, network devices and PCI hosts, and C helpers.

#![allow(
    clippy::all,
    clippy::as_underscore,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_imports
)]

mod generated {
    pub use kernel::bindings::*;
    use kernel::ffi;
    use pin_init::MaybeZeroable;

    include!(concat!(
        env!("HYPERV_OBJ"),
        "/rust/bindings/bindings_generated.rs"
    ));
}

mod helpers {
    use super::generated::*;
    use kernel::ffi;

    include!(concat!(
        env!("HYPERV_OBJ"),
        "/rust/bindings/bindings_helpers_generated.rs"
    ));
}

pub use generated::*;
pub use helpers::*;
