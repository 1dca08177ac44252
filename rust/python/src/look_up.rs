//! Many names looked up in one call, on several threads if that is worth it.

use std::thread::{self, Builder, ScopedJoinHandle};

use pdrs_core::IndexMap as Map;
use pyo3::prelude::*;

use crate::name::Name;
use crate::tensor::Torch;

/// In a smaller map a look-up hardly waits for memory.
const SHARED_FROM: usize = 1 << 17;

/// So many names take several times as long as to start a thread for them.
const NAMES_PER_THREAD: usize = 2048;

/// How many threads to look so many names up with.
///
/// In a map larger than the cache all the time goes by waiting for memory, which answers several cores at a time.
pub(crate) fn threads(py: Python<'_>, entries: usize, names: usize) -> PyResult<usize> {
    let useful = if entries < SHARED_FROM { 1 } else { names / NAMES_PER_THREAD };
    if useful > 1 { Torch::get(py)?.threads(py, useful) } else { Ok(1) }
}

/// The rows of names in their order, -1 for those that are not there.
pub(crate) fn rows_of(map: &Map<Name, i64>, names: &[Name], threads: usize) -> Vec<i64> {
    let find = |names: &[Name]| {
        let mut rows = Vec::with_capacity(names.len());
        map.get_many(names, |_, row| rows.push(row.copied().unwrap_or(-1)));
        rows
    };
    if threads == 1 {
        return find(names);
    }
    let mut parts = names.chunks(names.len().div_ceil(threads).max(1));
    // The threads end with this call. They run no Python code and count no references: all that they read, hashes too,
    // is there already, and this thread keeps it.
    thread::scope(|scope| {
        let (first, find) = (parts.next().unwrap_or_default(), &find);
        let start = |part| Builder::new().name("pdrs-find".into()).spawn_scoped(scope, move || find(part)).ok();
        let others: Vec<_> = parts.map(|part| (part, start(part))).collect();
        let mut rows = find(first);
        for (part, started) in others {
            match started.map(ScopedJoinHandle::join) {
                Some(Ok(found)) => rows.extend(found),
                _ => rows.extend(find(part)),
            }
        }
        rows
    })
}

/// The places of rows that were not found.
pub(crate) fn missing(rows: &[i64]) -> impl Iterator<Item = usize> {
    (0..rows.len()).filter(|at| rows[*at] < 0)
}
