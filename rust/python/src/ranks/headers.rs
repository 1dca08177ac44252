//! What a rank tells the others in front of the data for them, as arrays.

use numpy::{
    Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArrayDyn,
    PyReadwriteArray2, PyReadwriteArrayDyn,
};
use pdrs_core::headers::{Call, Headers as Of, Meeting, Message as Written, PAYLOAD, Payload, TOLD};
use pdrs_core::row_steps::Real;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::python::memory::OrRaise;

/// Writes what a rank tells the others, and reads what they tell.
#[pyclass(frozen, module = "pdrs._core")]
pub(crate) struct Headers {
    of: Of,
}

/// The message, how much of it is for each rank, and what this rank tells itself.
type Message<'py> = (Bound<'py, PyArray1<u8>>, Vec<usize>, Bound<'py, PyArray2<i64>>);

/// Whether the ranks differ, whether one has failed, and whose data comes later.
type Found = (bool, bool, Vec<bool>);

fn found(meeting: Meeting) -> Found {
    match meeting {
        Meeting::Agreed(later) => (false, false, later),
        Meeting::Differs => (true, false, Vec::new()),
        Meeting::Failed => (false, true, Vec::new()),
    }
}

#[pymethods]
impl Headers {
    #[new]
    fn new(rank: usize, ranks: usize) -> PyResult<Self> {
        if rank >= ranks {
            return Err(PyValueError::new_err(format!("expected a rank below {ranks}, got {rank}")));
        }
        Ok(Self { of: Of { rank, ranks } })
    }

    #[expect(clippy::too_many_arguments, reason = "they are what a message is made of")]
    fn message<'py>(
        &self,
        py: Python<'py>,
        call: Call,
        status: i64,
        has_failed: bool,
        payload: &Bound<'py, PyAny>,
        data: Option<PyReadonlyArrayDyn<'py, u8>>,
        give: Option<Vec<usize>>,
        room: usize,
    ) -> PyResult<Message<'py>> {
        let of_each = payload.cast::<PyArray2<i64>>().ok().map(PyArrayMethods::readonly);
        let payload = match &of_each {
            Some(numbers) => Payload::ForEach(numbers.as_slice()?),
            None => Payload::ForAll(payload.extract::<[i64; PAYLOAD]>()?),
        };
        let data = data.as_ref().map(PyReadonlyArrayDyn::as_slice).transpose()?;
        let found = self.of.message(call, (status, has_failed), &payload, data, give.as_deref(), room).or_raise()?;
        self.arrays(py, found)
    }

    #[expect(clippy::too_many_arguments, reason = "they are what a message is made of, and what is added")]
    fn message_of_sums<'py>(
        &self,
        py: Python<'py>,
        call: Call,
        payload: [i64; PAYLOAD],
        rows: PyReadonlyArray1<'py, i64>,
        given: &Bound<'py, PyAny>,
        give: Vec<usize>,
        room: usize,
    ) -> PyResult<(Message<'py>, Bound<'py, PyArray1<u8>>)> {
        let rows = rows.as_slice()?;
        let (message, own) = if let Ok(given) = given.cast::<PyArray2<f32>>() {
            self.sums(call, payload, rows, &given.readonly(), &give, room)
        } else {
            self.sums(call, payload, rows, &given.cast::<PyArray2<f64>>()?.readonly(), &give, room)
        }?;
        Ok((self.arrays(py, message)?, PyArray1::from_vec(py, own)))
    }

    fn read(
        &self,
        windows: PyReadonlyArray2<'_, u8>,
        call: Call,
        mut told: PyReadwriteArray2<'_, i64>,
    ) -> PyResult<Found> {
        Ok(found(self.of.read(windows.as_slice()?, call, told.as_slice_mut()?).or_raise()?))
    }

    #[expect(clippy::too_many_arguments, reason = "they are those of `read` and of `receive`")]
    fn read_and_receive(
        &self,
        windows: PyReadonlyArray2<'_, u8>,
        call: Call,
        mut told: PyReadwriteArray2<'_, i64>,
        own: PyReadonlyArray1<'_, u8>,
        take: Vec<usize>,
        rows: Option<(usize, PyReadonlyArray1<'_, i64>)>,
        mut into: PyReadwriteArrayDyn<'_, u8>,
    ) -> PyResult<(bool, bool, Vec<bool>, bool)> {
        let (windows, own, told) = (windows.as_slice()?, own.as_slice()?, told.as_slice_mut()?);
        let into = into.as_slice_mut()?;
        let rows = rows.as_ref().map(|(width, rows)| rows.as_slice().map(|rows| (*width, rows))).transpose()?;
        let (meeting, have_come) = self.of.read_and_receive(windows, call, told, own, &take, rows, into).or_raise()?;
        let (differs, has_failed, later) = found(meeting);
        Ok((differs, has_failed, later, have_come))
    }

    fn receive(
        &self,
        windows: PyReadonlyArray2<'_, u8>,
        own: PyReadonlyArray1<'_, u8>,
        take: Vec<usize>,
        later: Vec<bool>,
        of_later: PyReadonlyArray1<'_, u8>,
        mut into: PyReadwriteArrayDyn<'_, u8>,
    ) -> PyResult<()> {
        let (windows, own, of_later) = (windows.as_slice()?, own.as_slice()?, of_later.as_slice()?);
        self.of.receive(windows, own, &take, &later, of_later, into.as_slice_mut()?).or_raise()
    }
}

impl Headers {
    fn sums<T: Real + Element>(
        &self,
        call: Call,
        payload: [i64; PAYLOAD],
        rows: &[i64],
        given: &PyReadonlyArray2<'_, T>,
        give: &[usize],
        room: usize,
    ) -> PyResult<(Written, Vec<u8>)> {
        let elements = given.as_array().ncols();
        self.of.message_of_sums(call, payload, (elements, rows, given.as_slice()?), give, room).or_raise()
    }

    fn arrays<'py>(&self, py: Python<'py>, message: Written) -> PyResult<Message<'py>> {
        let told = PyArray1::from_vec(py, message.told).reshape([self.of.ranks, TOLD])?;
        Ok((PyArray1::from_vec(py, message.bytes), message.sizes, told))
    }
}
