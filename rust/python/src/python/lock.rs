//! The lock of a dictionary: its holder may take it again, as `threading.RLock`, and native code takes it without a
//! detour through Python.
//!
//! Python code may run while the lock is held: a callback, or a finalizer that the garbage collector calls wherever an
//! object is made. On the thread that holds the lock it gets in, so the lock knows what it would get into:
//!
//! - while a change is *made* ([`one_step`]), names and rows disagree, and nobody gets in;
//! - while a change is planned, or several things are read that belong together ([`Stay`]), who only reads gets in.
//!
//! A thread that is gone because the process was forked has given back what it held, unless it was making a change.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// How long a thread waits before it looks whether there was a signal, such as Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(50);

/// One of all locks, so that a fork can hold it: a thread that is gone then leaves none locked. It guards nothing.
static WAITING: Mutex<()> = Mutex::new(());
static FREED: Condvar = Condvar::new();

/// The number of the next thread. Numbers are never given again.
static NEXT_THREAD: AtomicU64 = AtomicU64::new(1);
/// Threads with lower numbers did not survive a fork of the process, except the one that forked it.
static FIRST_THREAD: AtomicU64 = AtomicU64::new(0);
static FORKED_BY: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static THREAD: u64 = NEXT_THREAD.fetch_add(1, SeqCst);
    /// The locks that this thread holds.
    static HELD: RefCell<Vec<Py<Lock>>> = const { RefCell::new(Vec::new()) };
    /// What a fork holds.
    static FORKING: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) };
}

/// Who waits for it lets other Python threads run.
#[pyclass(frozen, module = "pdrs._core")]
#[derive(Default)]
pub(crate) struct Lock {
    /// The thread that holds it, or 0.
    holder: AtomicU64,
    waiting: AtomicUsize,
    // These are the holder's.
    times: AtomicUsize,
    stays: AtomicUsize,
    changing: AtomicBool,
}

const CHANGING: &str = "the dictionary is being changed: what runs in the middle of a change, such as a finalizer, \
                        cannot use it";
const STAYING: &str = "the dictionary is being changed, or read as a whole: what runs meanwhile on the same thread, such \
                       as a finalizer, a hook or init, may read it, and cannot change it";
const LOST: &str = "the dictionary was being changed by another thread when this process was forked, and cannot be used \
                    here: fork while no thread changes it";

/// `None` on a thread that has it already, because it is about to fork the process.
fn wait_lock() -> Option<MutexGuard<'static, ()>> {
    let is_forking = FORKING.with_borrow(Option::is_some);
    (!is_forking).then(|| WAITING.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Lock {
    fn acquire(lock: &Bound<'_, Self>) -> PyResult<()> {
        let py = lock.py();
        let (this, thread) = (lock.get(), THREAD.with(|thread| *thread));
        while !this.take(thread)? {
            py.detach(|| this.wait());
            py.check_signals()?;
        }
        if this.times.fetch_add(1, SeqCst) == 0 {
            HELD.with_borrow_mut(|held| held.push(lock.clone().unbind()));
        }
        Ok(())
    }

    /// Makes a thread the holder; false if another is.
    fn take(&self, thread: u64) -> PyResult<bool> {
        let Err(holder) = self.holder.compare_exchange(0, thread, SeqCst, SeqCst) else {
            return Ok(true);
        };
        let is_gone = holder < FIRST_THREAD.load(SeqCst) && holder != FORKED_BY.load(SeqCst);
        if self.changing.load(SeqCst) && (holder == thread || is_gone) {
            return Err(PyRuntimeError::new_err(if is_gone { LOST } else { CHANGING }));
        }
        if !is_gone || self.holder.compare_exchange(holder, thread, SeqCst, SeqCst).is_err() {
            return Ok(holder == thread);
        }
        self.times.store(0, SeqCst);
        self.stays.store(0, SeqCst);
        Ok(true)
    }

    fn wait(&self) {
        self.waiting.fetch_add(1, SeqCst);
        let is_held = |(): &mut ()| self.holder.load(SeqCst) != 0;
        match wait_lock() {
            Some(guard) => drop(FREED.wait_timeout_while(guard, PATIENCE, is_held)),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
        self.waiting.fetch_sub(1, SeqCst);
    }

    fn release(&self) -> PyResult<()> {
        if self.holder.load(SeqCst) != THREAD.with(|thread| *thread) {
            return Err(PyRuntimeError::new_err("cannot give back a lock that this thread does not hold"));
        }
        if self.times.fetch_sub(1, SeqCst) > 1 {
            return Ok(());
        }
        let kept = HELD.with_borrow_mut(|held| {
            let place = held.iter().rposition(|one| std::ptr::eq(one.get(), self));
            place.map(|place| held.remove(place))
        });
        self.holder.store(0, SeqCst);
        // Only then, because it is a system call.
        if self.waiting.load(SeqCst) > 0 {
            // A thread that forks the process has this one, and Python code runs before it gives it back: to wait for it
            // with the interpreter would be for ever.
            if WAITING.try_lock().is_err() {
                Python::attach(|py| py.detach(|| drop(wait_lock())));
            }
            FREED.notify_all();
        }
        drop(kept);
        Ok(())
    }

    /// Takes the lock until what is given is dropped, on the same thread.
    pub(crate) fn hold(lock: Bound<'_, Self>) -> PyResult<Holding<'_>> {
        Self::acquire(&lock)?;
        Ok(Holding(lock))
    }

    /// An error if the holder of the lock, on whose thread this is, plans a change or reads things that belong together.
    pub(crate) fn refuse_change(&self) -> PyResult<()> {
        if self.stays.load(SeqCst) > 0 {
            return Err(PyRuntimeError::new_err(STAYING));
        }
        Ok(())
    }
}

/// A lock that is held.
pub(crate) struct Holding<'py>(Bound<'py, Lock>);

impl Holding<'_> {
    pub(crate) fn lock(&self) -> &Lock {
        self.0.get()
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        let released = self.0.get().release();
        debug_assert!(released.is_ok(), "a lock that is held can be given back");
    }
}

/// Makes a change in one step: until it is done, nobody gets into what the locks guard that this thread holds.
pub(crate) fn one_step<T>(py: Python<'_>, change: impl FnOnce() -> T) -> T {
    struct Step(Vec<Py<Lock>>);
    impl Drop for Step {
        fn drop(&mut self) {
            self.0.iter().for_each(|lock| lock.get().changing.store(false, SeqCst));
        }
    }
    let locks = HELD.with_borrow(|held| {
        // One that is in a step already is left to that.
        let others = held.iter().filter(|lock| !lock.get().changing.swap(true, SeqCst));
        others.map(|lock| lock.clone_ref(py)).collect()
    });
    let step = Step(locks);
    let made = change();
    drop(step);
    made
}

#[pymethods]
impl Lock {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn __enter__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::acquire(slf)
    }

    #[pyo3(signature = (class, error, traceback, /))]
    fn __exit__(
        &self,
        class: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (class, error, traceback);
        self.release()
    }

    /// A context to plan and make a change in. Who is in such a context, or in one to read in, gets an error.
    fn change(slf: &Bound<'_, Self>) -> Stay {
        Stay { lock: slf.clone().unbind(), is_change: true }
    }

    /// A context to read things in that belong together.
    fn read(slf: &Bound<'_, Self>) -> Stay {
        Stay { lock: slf.clone().unbind(), is_change: false }
    }

    /// Lets no thread wait for a lock while the process is forked.
    #[staticmethod]
    fn before_fork() {
        if let Some(guard) = wait_lock() {
            FORKING.with_borrow_mut(|forking| *forking = Some(guard));
        }
    }

    #[staticmethod]
    fn after_fork_in_parent() {
        FORKING.with_borrow_mut(|forking| drop(forking.take()));
    }

    /// Gives back what is held by threads that this process has not.
    #[staticmethod]
    fn after_fork_in_child() {
        let thread = THREAD.with(|thread| *thread);
        FORKED_BY.store(thread, SeqCst);
        FIRST_THREAD.store(NEXT_THREAD.load(SeqCst), SeqCst);
        Self::after_fork_in_parent();
    }
}

/// Holds a lock while rows stay where they are, except for what the holder does.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct Stay {
    lock: Py<Lock>,
    is_change: bool,
}

#[pymethods]
impl Stay {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        let lock = self.lock.bind(py);
        Lock::acquire(lock)?;
        if self.is_change
            && let Err(error) = lock.get().refuse_change()
        {
            lock.get().release()?;
            return Err(error);
        }
        lock.get().stays.fetch_add(1, SeqCst);
        Ok(())
    }

    #[pyo3(signature = (class, error, traceback, /))]
    fn __exit__(
        &self,
        class: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (class, error, traceback);
        let lock = self.lock.get();
        if lock.holder.load(SeqCst) == THREAD.with(|thread| *thread) {
            lock.stays.fetch_sub(1, SeqCst);
        }
        lock.release()
    }
}
