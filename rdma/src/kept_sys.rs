//! Devices that librdmacm keeps open for us, and how to let go of one that is being removed.
//!
//! A driver that can't take a device away under its users (rxe and siw can't) has its removal, `rdma
//! link delete`, wait until all of them have closed it. librdmacm closes a device only when it looks
//! at the list of devices, finds that it is gone, and nobody counts on it any more; where that list is
//! empty it does not even look. So a process that has used its only device would keep it until it
//! ends. Here is counted who uses a device, and the last one closes the kernel's files.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdma_sys::{ibv_context, rdma_free_devices, rdma_get_devices};

use crate::error::RdmaError;

/// One RDMA device, kept open by librdmacm for as long as this is there.
///
/// It counts on this one only, not on all devices as the library's list of them does: the library
/// closes what was removed once nobody counts on it any more.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The device, and the list's NULL.
    list: NonNull<*mut ibv_context>,
}

// SAFETY: the list is written before it is shared, and only read from then on.
unsafe impl Send for Kept {}
// SAFETY: as for `Send`.
unsafe impl Sync for Kept {}

impl Kept {
    /// The open device with this address, as a connection names it.
    pub(crate) fn open(verbs: *mut ibv_context) -> Result<Self, RdmaError> {
        // SAFETY: plain memory, zeroed; two entries do not overflow.
        let list = unsafe { libc::calloc(2, size_of::<*mut ibv_context>()) };
        let list = NonNull::new(list.cast::<*mut ibv_context>());
        let list = list.ok_or_else(|| RdmaError::last("calloc"))?;
        // From here on it frees the list, whatever that holds.
        let this = Self { list };
        // SAFETY: a null pointer for the count is allowed by rdma_get_devices(3).
        let all = unsafe { rdma_get_devices(ptr::null_mut()) };
        let all = NonNull::new(all).ok_or_else(|| RdmaError::last("rdma_get_devices"))?.as_ptr();
        let (mut from, mut to) = (all, all);
        // SAFETY:
        // - `from` starts at the first entry of `all`, which ends with NULL, and stops there; `to` is
        //   never past it.
        // - `list` has room for one entry and a NULL, which it has had since it was made.
        // - each entry stands in one of both lists afterwards and so is counted out once, by the
        //   `rdma_free_devices` of its list, which reads up to the NULL and calls free(3).
        unsafe {
            while !(*from).is_null() {
                if *from == verbs {
                    *list.as_ptr() = verbs;
                } else {
                    *to = *from;
                    to = to.add(1);
                }
                from = from.add(1);
            }
            *to = ptr::null_mut();
            rdma_free_devices(all);
        }
        let Some(key) = this.key() else { return Err(RdmaError::DeviceRemoved) };
        all_kept().entry(key).or_default().count += 1;
        Ok(this)
    }

    /// The device is being taken away.
    pub(crate) fn note_removed(&self) {
        let key = self.key().expect("an open device");
        all_kept().entry(key).or_default().removed = true;
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.key().is_some_and(|key| all_kept().get(&key).is_some_and(|it| it.removed))
    }

    fn device(&self) -> Option<NonNull<ibv_context>> {
        // SAFETY: the list has at least its NULL.
        NonNull::new(unsafe { *self.list.as_ptr() })
    }

    fn key(&self) -> Option<usize> {
        self.device().map(|device| device.as_ptr().addr())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(device) = self.device() {
            let mut all = all_kept();
            let users = all.entry(device.as_ptr().addr()).or_default();
            users.count -= 1;
            if users.count == 0 {
                if users.removed {
                    // SAFETY:
                    // - open: it is counted out below, and nobody else's number can be among its.
                    // - whatever is made of a device holds one of these, and this was the last.
                    unsafe { let_go(device) };
                }
                all.remove(&device.as_ptr().addr());
            }
        }
        // SAFETY: a list of the library's form from malloc(3), freed once.
        unsafe { rdma_free_devices(self.list.as_ptr()) };
    }
}

/// Users of one device in this process.
#[derive(Debug, Default)]
struct Users {
    count: usize,
    removed: bool,
}

/// Of each device, by the address of librdmacm's context.
static KEPT: Mutex<BTreeMap<usize, Users>> = Mutex::new(BTreeMap::new());

fn all_kept() -> MutexGuard<'static, BTreeMap<usize, Users>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a device that is being removed from the library's hands.
///
/// The kernel's files are closed, and their numbers left to the library, which closes what is there
/// then once more some day.
///
/// # Safety
/// The context is open, and nothing that was made of it is used any more.
unsafe fn let_go(context: NonNull<ibv_context>) {
    // SAFETY: the caller's promise: both descriptors are open and the context's own.
    let files = unsafe { [context.as_ref().cmd_fd, context.as_ref().async_fd] };
    let null = match std::fs::File::open("/dev/null") {
        Ok(null) => null,
        Err(error) => return tracing::warn!(%error, "a removed RDMA device stays open"),
    };
    for file in files {
        // SAFETY:
        // - both numbers are open, `file` the context's own: no other owner's is closed.
        // - requests to what is there now fail, as those to a removed device may.
        if unsafe { libc::dup3(null.as_raw_fd(), file, libc::O_CLOEXEC) } < 0 {
            let error = io::Error::last_os_error();
            tracing::warn!(%error, "a removed RDMA device stays open");
        }
    }
}
