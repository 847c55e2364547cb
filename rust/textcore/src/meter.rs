//! A memory limit for one piece of work. minijinja counts the work of a template, but some of its operations (joining lists
//! that double) allocate without asking first, and an allocation that fails would end the process. So a rendering runs on
//! a thread of its own whose allocations are counted; one that goes over its limit stops that thread for good, in the
//! middle of the allocation, and the caller gets `None`. The thread's memory stays lost, so a caller must not run the
//! same work again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::sync::Arc;
use std::thread::{park, Builder, Thread};

const RUNNING: u8 = 0;
const DONE: u8 = 1;
const EXCEEDED: u8 = 2;

struct Meter {
    left: AtomicI64,
    state: AtomicU8,
    waiter: Thread,
}

thread_local! {
    /// The meter of this thread, or null. No destructor, so it can be read during any allocation.
    static METER: Cell<*const Meter> = const { Cell::new(std::ptr::null()) };
}

struct Metered;

#[global_allocator]
static ALLOCATOR: Metered = Metered;

#[inline]
fn charge(bytes: i64) {
    let meter = METER.try_with(Cell::get).unwrap_or(std::ptr::null());
    // SAFETY: `run` keeps the meter alive for as long as its thread has it set.
    if let Some(meter) = unsafe { meter.as_ref() } {
        if meter.left.fetch_sub(bytes, Ordering::Relaxed) < bytes {
            stop(meter);
        }
    }
}

#[cold]
fn stop(meter: &Meter) -> ! {
    meter.state.store(EXCEEDED, Ordering::Release);
    meter.waiter.unpark();
    loop {
        // SAFETY: pause only waits for a signal.
        unsafe { libc::pause() };
    }
}

// SAFETY: every request goes to the system's allocator unchanged; `charge` returns or never does.
unsafe impl GlobalAlloc for Metered {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        charge(layout.size() as i64);
        System.alloc(layout)
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        charge(layout.size() as i64);
        System.alloc_zeroed(layout)
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        charge(-(layout.size() as i64));
        System.dealloc(block, layout)
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        charge(new_size as i64 - layout.size() as i64);
        System.realloc(block, layout, new_size)
    }
}

/// Runs `job` with at most `bytes` of memory and `stack` bytes of stack; `None` if it wanted more memory. A panic of the
/// job goes on in the caller. Errors only if no thread can be started.
pub fn run<T: Send + 'static>(
    bytes: usize,
    stack: usize,
    job: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<Option<T>> {
    let meter = Arc::new(Meter {
        left: AtomicI64::new(bytes as i64),
        state: AtomicU8::new(RUNNING),
        waiter: std::thread::current(),
    });
    let shared = meter.clone();
    let thread = Builder::new().name("chat-template".to_string()).stack_size(stack).spawn(move || {
        METER.with(|slot| slot.set(Arc::as_ptr(&shared)));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        METER.with(|slot| slot.set(std::ptr::null()));
        shared.state.store(DONE, Ordering::Release);
        shared.waiter.unpark();
        result
    })?;
    loop {
        match meter.state.load(Ordering::Acquire) {
            RUNNING => park(),
            EXCEEDED => return Ok(None),
            _ => break,
        }
    }
    match thread.join() {
        Ok(Ok(value)) => Ok(Some(value)),
        Ok(Err(panic)) | Err(panic) => resume_unwind(panic),
    }
}
