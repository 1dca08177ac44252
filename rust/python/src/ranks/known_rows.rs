//! The names whose owner and row a rank knows, what it asks the owners for, and what it answers as one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pdrs_core::Error;
use pdrs_core::headers::PAYLOAD;
use pdrs_core::names::known::{Asked, Counts, KnownRows as Known, Owners, Request as Asking};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyList, PyString};

use crate::python::memory::{self, OrRaise, new_list, refused};
use crate::python::name::{NO_NAME, Utf8Name, text_of_utf8, with_listed};
use crate::python::names::{listed, to_names};

/// A bounded cache from names to the rank that owns them and their row there.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct KnownRows {
    state: Mutex<Known>,
}

/// What a batch of names asks the ranks for: rows of known names, and the text of others.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct Request {
    asking: Asking,
}

/// Which row that comes each name has: `None` if its number, how many come from each rank, and whether one has none.
type Placed<'py> = (Option<Bound<'py, PyArray1<i64>>>, Vec<usize>, bool);

/// The reply, the rows that go to the ranks, and how many go to each.
type Answer<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>, Vec<usize>);

#[pymethods]
impl KnownRows {
    #[new]
    fn new(limit: usize) -> Self {
        Self { state: Mutex::new(Known::new(limit)) }
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.state(py).len()
    }

    fn __sizeof__(&self, py: Python<'_>) -> usize {
        size_of::<Self>() + self.state(py).allocated_bytes()
    }

    fn add(&self, py: Python<'_>, request: &Request, rows: PyReadonlyArray1<'_, u32>) -> PyResult<()> {
        self.state(py).add(&request.asking, rows.as_slice()?).or_raise()
    }

    fn forget(&self, py: Python<'_>, owner: usize) {
        self.state(py).forget(owner);
    }
}

impl KnownRows {
    /// While this is held, no Python code runs.
    fn state(&self, py: Python<'_>) -> MutexGuard<'_, Known> {
        self.state.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Request {
    #[new]
    #[pyo3(signature = (names, known, world_size, first = 0, shards = None))]
    fn new(
        names: &Bound<'_, PyAny>,
        known: &Bound<'_, KnownRows>,
        world_size: usize,
        first: usize,
        shards: Option<usize>,
    ) -> PyResult<Self> {
        let (py, known) = (names.py(), known.get());
        let shards = shards.unwrap_or(world_size);
        let Some(owners) = Owners::new(first, shards, world_size) else {
            return Err(PyValueError::new_err(format!(
                "expected 1 to 4096 shards among {world_size} ranks, got {shards} from rank {first} on"
            )));
        };
        let names = &listed(names)?;
        // What is no plain `str` is taken there for a name that no `str` has.
        let mut state = known.state(py);
        let planned = with_listed(names, |listed| state.plan(listed, owners));
        drop(state);
        if let Some(asking) = planned.transpose().or_raise()?.flatten()
            && !asking.new_texts().any(|name| name == NO_NAME)
        {
            return Ok(Self { asking });
        }
        let planned = known.state(py).plan(&to_names::<Utf8Name>(names)?, owners).or_raise()?;
        let empty = || PyKeyError::new_err("parameter name can't be empty string \"\"");
        planned.map(|asking| Self { asking }).ok_or_else(empty)
    }

    fn __len__(&self) -> usize {
        self.asking.len()
    }

    #[getter]
    fn asks(&self) -> bool {
        self.asking.new_names() > 0
    }

    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let counts = &self.asking.counts;
        let number = |count: usize| (count as u64).cast_signed();
        let numbers = counts.iter().flat_map(|one| [number(one.known), number(one.new), number(one.text)]);
        PyArray1::from_vec(py, memory::collect(numbers)?).reshape([counts.len(), 3])
    }

    fn payload<'py>(&self, py: Python<'py>, generation: i64) -> PyResult<(Bound<'py, PyArray2<i64>>, Vec<usize>)> {
        let counts = &self.asking.counts;
        let number = |count: usize| (count as u64).cast_signed();
        let numbers = counts.iter().flat_map(|one| [number(one.known), number(one.new), number(one.text), generation]);
        let payload = PyArray1::from_vec(py, memory::collect(numbers)?).reshape([counts.len(), PAYLOAD])?;
        Ok((payload, memory::collect(counts.iter().map(Counts::bytes))?))
    }

    fn message<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        PyArray1::from_slice(py, &self.asking.message)
    }

    fn new_names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let names = self.asking.new_texts().map(|name| text_of_utf8(py, name));
        new_list(py, memory::try_collect(names)?.into_iter().map(Ok))
    }

    fn place<'py>(&self, py: Python<'py>, rows: PyReadonlyArray1<'py, u32>) -> PyResult<Placed<'py>> {
        let found = self.asking.place(rows.as_slice()?).or_raise()?;
        let places = (!found.is_identity).then(|| PyArray1::from_vec(py, found.places));
        Ok((places, found.take, found.has_absent))
    }
}

/// What refuses a message: the core, or Python where a name cannot be made.
struct Refused(PyErr);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self(refused(error))
    }
}

/// The new names that all ranks ask for, those of the first rank first.
#[pyfunction]
pub(crate) fn asked_names<'py>(
    py: Python<'py>,
    message: PyReadonlyArray1<'py, u8>,
    counts: PyReadonlyArray2<'py, i64>,
) -> PyResult<Bound<'py, PyList>> {
    let counts = to_counts(&counts)?;
    let asked = Asked::of(message.as_slice()?, &counts).or_raise()?;
    let mut names: Vec<Bound<'py, PyString>> = Vec::new();
    let each = |name: &[u8]| text_of_utf8(py, name).and_then(|text| memory::push(&mut names, text)).map_err(Refused);
    asked.names(each).map_err(|Refused(error)| error)?;
    new_list(py, names.into_iter().map(Ok))
}

/// The bytes that each rank asks with.
#[pyfunction]
pub(crate) fn asked_bytes(counts: PyReadonlyArray2<'_, i64>) -> PyResult<Vec<usize>> {
    memory::collect(to_counts(&counts)?.iter().map(Counts::bytes))
}

/// What this rank answers to all ranks, by the row of each of these names; -1 for one without.
#[pyfunction]
pub(crate) fn answer_asked<'py>(
    py: Python<'py>,
    message: PyReadonlyArray1<'py, u8>,
    counts: PyReadonlyArray2<'py, i64>,
    rows: PyReadonlyArray1<'py, i64>,
) -> PyResult<Answer<'py>> {
    let counts = to_counts(&counts)?;
    let answer = Asked::of(message.as_slice()?, &counts).or_raise()?.answer(rows.as_slice()?).or_raise()?;
    Ok((PyArray1::from_vec(py, answer.reply), PyArray1::from_vec(py, answer.rows), answer.give))
}

fn to_counts(told: &PyReadonlyArray2<'_, i64>) -> PyResult<Vec<Counts>> {
    let told = told.as_array();
    if told.ncols() != 3 {
        return Err(PyValueError::new_err(format!("expected three numbers for each rank, got {}", told.ncols())));
    }
    let count = |number: i64| {
        usize::try_from(number).map_err(|_| PyValueError::new_err(format!("a rank asks for {number} names")))
    };
    memory::try_collect(
        told.rows()
            .into_iter()
            .map(|of_rank| Ok(Counts { known: count(of_rank[0])?, new: count(of_rank[1])?, text: count(of_rank[2])? })),
    )
}
