//! The names of an archive as they lie in its file: looked up there, and read into memory when they change.

use std::ptr;

use numpy::PyArrayMethods;
use pdrs_core::names::codec::{self, Names, hash};
use pdrs_core::names::text::Text;
use pdrs_core::{MAX_TABLES, Place, Places as Found, Refusal, RowIndex as Index};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::python::memory::{self, OrRaise};
use crate::python::name::text_of_utf8;
use crate::stacked::plan::no_table;
use crate::stacked::source::Source;
use crate::torch::bytes::hint;

/// How many names are looked up together.
const BATCH: usize = 64;

/// The packed names of one dictionary, or those of all parts of a module, each with the prefix of its part.
pub(crate) struct Packed {
    /// The dictionaries in order, and at the end the single tensors, if there are any.
    sources: Vec<Source>,
    /// The dictionaries, sorted by their prefixes. None of these begins another.
    sorted: Vec<usize>,
    runs: Vec<Run>,
    len: usize,
    /// How many rows of each table were ever given.
    used: Vec<u64>,
    pub(crate) moves: u64,
    pub(crate) inserts: u64,
}

/// Names that are adjacent in their source, and among all.
struct Run {
    /// The position of the first one among all.
    start: usize,
    source: usize,
    /// The number of the first one in its source.
    first: usize,
    count: usize,
}

impl Packed {
    /// The names of one dictionary.
    pub(crate) fn of(source: Source) -> PyResult<Self> {
        let used = memory::collect(source.used.iter().copied())?;
        let runs = vec![Run { start: 0, source: 0, first: 0, count: source.len() }];
        let (moves, inserts) = (Index::new_count(), Index::new_count());
        Ok(Self { len: source.len(), sources: vec![source], sorted: vec![0], runs, used, moves, inserts })
    }

    /// The names of dictionaries and of single tensors. **O(parts log parts)**, where each single tensor is a part.
    ///
    /// `before` says how many single tensors stand immediately before each dictionary. `None` if a prefix begins
    /// another, if a tensor has the name of an entry, or if there are too many tables.
    pub(crate) fn joined(
        py: Python<'_>,
        mut sources: Vec<Source>,
        before: &[usize],
        singles: Option<Source>,
    ) -> PyResult<Option<Self>> {
        let count = sources.len();
        let mut sorted: Vec<usize> = memory::collect(0..count)?;
        sorted.sort_unstable_by(|one, other| sources[*one].prefix.cmp(&sources[*other].prefix));
        let begins = |pair: &[usize]| sources[pair[1]].prefix.starts_with(&sources[pair[0]].prefix);
        if sorted.windows(2).any(begins) {
            return Ok(None);
        }
        let lengths: Vec<usize> = memory::collect(sources.iter().map(Source::len))?;
        let mut left = singles.as_ref().map_or(0, Source::len);
        sources.extend(singles);
        let tables = sources.iter().map(|source| source.first_table.saturating_add(source.used.len())).max();
        if tables.unwrap_or(0) > MAX_TABLES {
            return Ok(None);
        }
        let mut used = Vec::new();
        pdrs_core::memory::resize(&mut used, tables.unwrap_or(0), 0).or_raise()?;
        for source in sources.iter().rev() {
            used[source.first_table..][..source.used.len()].copy_from_slice(&source.used);
        }
        let (mut runs, mut len, mut seen) = (memory::with_capacity(2 * count + 1)?, 0, 0);
        let mut push = |source, first, count| {
            runs.push(Run { start: len, source, first, count });
            len += count;
        };
        for (source, (length, before)) in lengths.into_iter().zip(before).enumerate() {
            let before = left.min(*before);
            push(count, seen, before);
            push(source, 0, length);
            (seen, left) = (seen + before, left - before);
        }
        push(count, seen, left);
        runs.retain(|run| run.count > 0);
        let (moves, inserts) = (Index::new_count(), Index::new_count());
        let made = Self { sources, sorted, runs, len, used, moves, inserts };
        let twice = made.with(py, |names| {
            let mut singles = names.get(count).into_iter().flat_map(Names::iter);
            singles.any(|(name, _)| made.entry_named(names, name).is_some())
        })?;
        Ok(if twice { None } else { Some(made) })
    }

    /// The only dictionary, if there are no other names.
    pub(crate) fn only(&self) -> Option<&Source> {
        if let [source] = &*self.sources
            && source.prefix.is_empty()
        {
            Some(source)
        } else {
            None
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn used(&self) -> &[u64] {
        &self.used
    }

    /// Hands over the names of each source. It asks `NumPy` for the bytes, which may run Python code the first time.
    pub(crate) fn with<R>(&self, py: Python<'_>, take: impl FnOnce(&[Names<'_>]) -> R) -> PyResult<R> {
        let held = memory::try_collect(self.sources.iter().map(|source| Ok(source.bytes.bind(py).try_readonly()?)))?;
        let names =
            self.sources.iter().zip(&held).map(|(source, held)| source.parts.names(held.as_slice()?).or_raise());
        Ok(take(&memory::try_collect(names)?))
    }

    /// The dictionary that alone can have a name, and the name in it. **O(log parts)**.
    ///
    /// What begins a text sorts before it, and so does what lies between both: that would begin with the former.
    #[inline]
    fn dictionary_of<'a>(&self, name: &'a [u8]) -> Option<(usize, &'a [u8])> {
        let source = if let [source] = *self.sorted {
            source
        } else {
            let behind = self.sorted.partition_point(|source| *self.sources[*source].prefix <= *name);
            self.sorted[behind.checked_sub(1)?]
        };
        name.strip_prefix(&*self.sources[source].prefix).map(|rest| (source, rest))
    }

    /// The number of the source of single tensors, if there are any.
    #[inline]
    fn singles(&self) -> Option<usize> {
        (self.sources.len() > self.sorted.len()).then_some(self.sorted.len())
    }

    /// The source to look into first, and the name in it.
    #[inline]
    fn source_of<'a>(&self, name: &'a [u8]) -> Option<(usize, &'a [u8])> {
        self.dictionary_of(name).or_else(|| self.singles().map(|source| (source, name)))
    }

    fn entry_named(&self, names: &[Names<'_>], name: &[u8]) -> Option<Place> {
        let (source, rest) = self.dictionary_of(name)?;
        self.sources[source].find(&names[source], rest)
    }

    fn single_named(&self, names: &[Names<'_>], name: &[u8]) -> Option<Place> {
        let source = self.singles()?;
        self.sources[source].find(&names[source], name)
    }

    /// The place of a name, if it is there. **O(log parts)**.
    pub(crate) fn place(&self, py: Python<'_>, name: &impl Text) -> PyResult<Option<Place>> {
        let find = |source: usize, text: &[u8]| {
            let source = &self.sources[source];
            source.with(py, |names| source.find(names, text))
        };
        name.with_utf8(|text| {
            let found = self.dictionary_of(text).map_or(Ok(None), |(source, rest)| find(source, rest))?;
            if found.is_some() { Ok(found) } else { self.singles().map_or(Ok(None), |source| find(source, text)) }
        })
    }

    /// The place of each of many names. **O(m log parts)**.
    ///
    /// All that a name needs is loaded a batch ahead: the cache misses of a batch overlap.
    /// Runs no Python code.
    pub(crate) fn places<Q: Text>(&self, names: &[Names<'_>], wanted: &[Q]) -> PyResult<Found> {
        let load = |place: Option<&u8>| place.into_iter().for_each(|place| hint(ptr::from_ref(place) as usize));
        let mut places = memory::with_capacity(wanted.len())?;
        // The source and the hash of each name of a batch, and the number that it most likely has there.
        let (mut homes, mut numbers) = ([None; BATCH], [None; BATCH]);
        let mut batches = wanted.chunks(BATCH).peekable();
        while let Some(batch) = batches.next() {
            for (home, name) in homes.iter_mut().zip(batch) {
                *home =
                    name.with_utf8(|text| self.source_of(text).map(|(source, rest)| (source, rest.len(), hash(rest))));
                load(home.and_then(|(source, _, hash)| names[source].home(hash)));
            }
            batches.peek().into_iter().copied().flatten().for_each(Q::prefetch);
            for (number, home) in numbers.iter_mut().zip(&homes[..batch.len()]) {
                *number = home.and_then(|(source, _, hash)| {
                    let number = names[source].candidate(hash)?;
                    names[source].entry(number).into_iter().for_each(load);
                    Some(number)
                });
            }
            for (number, home) in numbers.iter().zip(&homes[..batch.len()]) {
                load(number.zip(*home).and_then(|(number, (source, ..))| names[source].name(number)?.first()));
            }
            for ((name, home), number) in batch.iter().zip(&homes).zip(&numbers) {
                places.push(name.with_utf8(|text| {
                    let (source, length, hash) = (*home)?;
                    let (of_source, rest) = (&names[source], &text[text.len() - length..]);
                    let found = match number {
                        Some(number) if of_source.name(*number) == Some(rest) => Some(*number),
                        Some(_) => of_source.find(hash, |other| other == rest),
                        None => None,
                    };
                    let place = found.and_then(|number| self.sources[source].place_at(of_source, number));
                    place.or_else(|| self.single_named(names, text))
                }));
            }
        }
        Ok(places.into())
    }

    /// How many names lie in a table. **O(n)**, or **O(1)** if there is one table.
    pub(crate) fn count(&self, py: Python<'_>, table: i64) -> PyResult<u64> {
        let number = usize::try_from(table).ok().filter(|table| *table < self.used.len());
        let number = number.ok_or_else(|| no_table(table))?;
        if self.used.len() == 1 {
            return Ok(self.len as u64);
        }
        let places = self.all_places(py)?;
        Ok(places.iter().flatten().filter(|place| place.table() == number).count() as u64)
    }

    /// All places, in order. **O(n)**.
    pub(crate) fn all_places(&self, py: Python<'_>) -> PyResult<Found> {
        let mut places = memory::with_capacity(self.len)?;
        self.with(py, |names| {
            for run in &self.runs {
                let (source, names) = (&self.sources[run.source], &names[run.source]);
                places.extend((run.first..).take(run.count).map(|at| source.place_at(names, at)));
            }
        })?;
        Ok(places.into())
    }

    /// Hands over each name in UTF-8, in order, with its place; an error where the bytes do not have one. **O(n)**.
    pub(crate) fn for_each(&self, py: Python<'_>, mut take: impl FnMut(&[u8], Option<Place>)) -> PyResult<()> {
        let mut buffer = Vec::new();
        self.with(py, |names| {
            for run in &self.runs {
                let (source, names) = (&self.sources[run.source], &names[run.source]);
                for at in (run.first..).take(run.count) {
                    let name = names.name(at).ok_or_else(|| source.damaged("a name does not lie in them"))?;
                    take(source.whole(name, &mut buffer)?, source.place_at(names, at));
                }
            }
            Ok(())
        })?
    }

    /// The source of the name at a position, and its number there.
    fn at(&self, position: usize) -> Option<(&Source, usize)> {
        let run = self.runs[..self.runs.partition_point(|run| run.start <= position)].last()?;
        (position < self.len).then(|| (&self.sources[run.source], run.first + position - run.start))
    }

    /// A name; `None` behind the last one.
    pub(crate) fn name<'py>(&self, py: Python<'py>, position: usize) -> PyResult<Option<Bound<'py, PyString>>> {
        self.at(position).map(|(source, number)| source.name(py, number)).transpose()
    }

    /// The place of the name at a position, if there is one.
    pub(crate) fn place_at(&self, py: Python<'_>, position: usize) -> PyResult<Option<Place>> {
        let Some((source, number)) = self.at(position) else { return Ok(None) };
        source.with(py, |names| source.place_at(names, number))
    }

    /// All names, in order. **O(n)**.
    pub(crate) fn names<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyString>>> {
        self.names_that(py, |_| true)
    }

    /// The names of which `keep` says so, in order. **O(n)**.
    pub(crate) fn names_that<'py>(
        &self,
        py: Python<'py>,
        keep: impl Fn(&[u8]) -> bool,
    ) -> PyResult<Vec<Bound<'py, PyString>>> {
        let (mut made, mut failed, mut position) = (Vec::new(), None, 0);
        self.for_each(py, |name, _| {
            if failed.is_none() && keep(name) {
                let pushed = text_of_utf8(py, name).and_then(|name| memory::push(&mut made, name));
                failed = pushed.err().map(|error| (position, error));
            }
            position += 1;
        })?;
        match failed {
            Some((position, error)) => {
                Err(self.at(position).map(|(source, _)| source.unreadable(py, error)).expect("it was there"))
            }
            None => Ok(made),
        }
    }

    /// An index of the same names in memory. **O(n)**.
    pub(crate) fn to_index(&self, py: Python<'_>) -> PyResult<Index> {
        for source in &self.sources {
            let held = source.bytes.bind(py).try_readonly()?;
            codec::decode(held.as_slice()?).or_raise().map_err(|error| source.damaged(error.value(py)))?;
        }
        let (places, mut shown) = (self.all_places(py)?, Vec::new());
        let made = self.with(py, |names| {
            let mut listed: Vec<&[u8]> = memory::with_capacity(self.len)?;
            if let ([names], Some(_)) = (names, self.only()) {
                listed.extend(names.iter().map(|(name, _)| name));
            } else {
                let ends = self.show(names, &mut shown)?;
                let mut start = 0;
                for end in ends {
                    listed.push(&shown[start..end]);
                    start = end;
                }
            }
            Ok::<_, PyErr>(Index::of(listed.into_iter(), &places, &self.used))
        })??;
        match made {
            Ok(index) => Ok(index.counted_from(self.moves, self.inserts)),
            Err(Refusal::Limit(error)) => Err(memory::refused(error)),
            Err(Refusal::Repeated { at }) => {
                let (source, number) = self.at(at).expect("it is one of the names");
                let name = source
                    .with(py, |names| String::from_utf8_lossy(names.name(number).unwrap_or_default()).into_owned())?;
                Err(source.damaged(format!("{name:?} is listed twice")))
            }
            Err(_) => Err(self.sources[0].damaged("a name has no row of its own")),
        }
    }

    /// Writes all names with their prefixes, and gives the ends.
    fn show(&self, names: &[Names<'_>], shown: &mut Vec<u8>) -> PyResult<Vec<usize>> {
        let mut ends = memory::with_capacity(self.len)?;
        for run in &self.runs {
            let (source, names) = (&self.sources[run.source], &names[run.source]);
            for name in (run.first..).take(run.count).map_while(|at| names.name(at)) {
                pdrs_core::memory::append(shown, &source.prefix).or_raise()?;
                pdrs_core::memory::append(shown, name).or_raise()?;
                ends.push(shown.len());
            }
        }
        Ok(ends)
    }
}

/// Whether packed names have words that do not fit to them: an error that says so.
#[pyfunction]
pub(crate) fn check_words(packed: numpy::PyReadonlyArray1<'_, u8>) -> PyResult<()> {
    let (_, names) = codec::decode(packed.as_slice()?).or_raise()?;
    if names.are_words_right().or_raise()? {
        return Ok(());
    }
    Err(PyValueError::new_err("the packed names are damaged: the table of words does not fit to the names"))
}
