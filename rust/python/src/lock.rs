//! A lock that its holder may take again, as `threading.RLock`, which native code takes without a detour through Python.
//!
//! Python's garbage collector waits meanwhile: what it collects may have finalizers that use what the lock guards, on the
//! very thread that holds it, half-way through a change. They run when the lock has been given back.
#![allow(unsafe_code)] // The collector is switched through the C API.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;

/// How long a thread waits before it looks whether there was a signal, such as Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(50);

/// How many locks the collector waits for.
static WAITED_FOR: AtomicUsize = AtomicUsize::new(0);

/// Who waits for it lets other Python threads run.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct Lock {
    /// Locked for a few instructions at a time, in which no Python code runs.
    held: Mutex<Held>,
    freed: Condvar,
}

#[derive(Default)]
struct Held {
    by: Option<ThreadId>,
    times: usize,
    waiting: usize,
    /// Whether the collector was running when the lock was taken.
    collects: bool,
}

impl Held {
    /// Takes the lock, or takes it again, unless another thread has it.
    fn take(&mut self, thread: ThreadId) -> bool {
        let taken = self.by.is_none_or(|by| by == thread);
        if taken {
            self.by = Some(thread);
            self.times += 1;
        }
        taken
    }

    /// Lets the collector go on, if it waits for this lock. The thread must be attached to the interpreter.
    fn let_collect(&mut self) {
        let fewer = |locks: usize| locks.checked_sub(1);
        // None is left behind a fork, which has let the collector go on.
        if std::mem::take(&mut self.collects)
            && WAITED_FOR.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok()
        {
            // SAFETY: as the caller promises. Nothing is collected before Python next makes an object.
            unsafe { ffi::PyGC_Enable() };
        }
    }
}

/// One that goes while it is held, by a thread that has ended, is given back.
impl Drop for Lock {
    fn drop(&mut self) {
        self.held().let_collect();
    }
}

impl Lock {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire(&self, py: Python<'_>) -> PyResult<()> {
        self.take(py)?;
        let mut held = self.held();
        if held.times == 1 {
            // SAFETY: this thread is attached to the interpreter.
            held.collects = unsafe { ffi::PyGC_Disable() } == 1;
            WAITED_FOR.fetch_add(held.collects.into(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn take(&self, py: Python<'_>) -> PyResult<()> {
        let thread = thread::current().id();
        if self.held().take(thread) {
            return Ok(());
        }
        let wait = || {
            let mut held = self.held();
            held.waiting += 1;
            let waited = self.freed.wait_timeout_while(held, PATIENCE, |held| held.by.is_some());
            let (mut held, _) = waited.unwrap_or_else(PoisonError::into_inner);
            held.waiting -= 1;
            held.take(thread)
        };
        while !py.detach(wait) {
            py.check_signals()?;
        }
        Ok(())
    }

    fn release(&self, _py: Python<'_>) -> PyResult<()> {
        let mut held = self.held();
        if held.by != Some(thread::current().id()) {
            return Err(PyRuntimeError::new_err("cannot give back a lock that this thread does not hold"));
        }
        held.times -= 1;
        if held.times == 0 {
            held.by = None;
            held.let_collect();
            // Only then, because it is a system call.
            if held.waiting > 0 {
                self.freed.notify_one();
            }
        }
        Ok(())
    }

    /// Takes the lock until what is given is dropped, on the same thread.
    pub(crate) fn hold(lock: Bound<'_, Self>) -> PyResult<Holding<'_>> {
        lock.get().acquire(lock.py())?;
        Ok(Holding(lock))
    }
}

/// A lock that is held.
pub(crate) struct Holding<'py>(Bound<'py, Lock>);

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        let released = self.0.get().release(self.0.py());
        debug_assert!(released.is_ok(), "a lock that is held can be given back");
    }
}

#[pymethods]
impl Lock {
    /// Lets the collector go on in a process that was forked while another thread, which it has not, held a lock.
    #[staticmethod]
    fn after_fork(_py: Python<'_>) {
        if WAITED_FOR.swap(0, Ordering::Relaxed) > 0 {
            // SAFETY: this thread is attached to the interpreter.
            unsafe { ffi::PyGC_Enable() };
        }
    }

    #[new]
    fn new() -> Self {
        Self { held: Mutex::default(), freed: Condvar::new() }
    }

    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        self.acquire(py)
    }

    #[pyo3(signature = (class, error, traceback, /))]
    fn __exit__(
        &self,
        class: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (error, traceback);
        self.release(class.py())
    }
}
