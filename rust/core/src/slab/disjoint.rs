//! Whether stretches of memory are apart, seen without sorting them.
//!
//! What was made in order lies in order ([`Stretches`]), whether or not it is aligned. What allocators give out begins a line of its own, or lies far from the rest. So a bit for each line tells nearly
//! always that stretches share no byte ([`Lines`]); several times faster than a sort, if they come in no order.

use std::ops::Range;

use crate::memory;

/// The bytes of a line.
const LINE: usize = 64;
/// Lines have their bits in chunks, because heaps lie far apart: 16 MiB of memory in 32 KiB.
const LINES_PER_CHUNK: usize = 1 << 18;

/// Cache lines that have been taken.
#[derive(Debug)]
pub struct Lines {
    /// The number of each chunk, ascending, and its bits.
    chunks: Vec<(usize, Box<[u64]>)>,
    /// The place of the chunk that was used last.
    latest: usize,
    most: usize,
}

impl Lines {
    /// No line is taken yet. About `stretches` stretches will be looked at: the bits may take 512 bytes for each, and
    /// 128 KiB.
    #[must_use]
    pub fn new(stretches: usize) -> Self {
        Self { chunks: Vec::new(), latest: 0, most: 4 + stretches / 64 }
    }

    /// Takes the lines that a stretch reaches into; `false` if one is taken already, or if it cannot be told.
    ///
    /// Computes in **O(lines)** time.
    #[inline]
    #[must_use]
    pub fn take(&mut self, stretch: Range<usize>) -> bool {
        words(stretch).all(|(chunk, word, mask)| {
            let Some(bits) = self.chunk(chunk) else {
                return false;
            };
            let is_free = bits[word] & mask == 0;
            bits[word] |= mask;
            is_free
        })
    }

    /// Whether no line that a stretch reaches into is taken. Computes in **O(lines)** time.
    #[inline]
    #[must_use]
    pub fn are_free(&self, stretch: Range<usize>) -> bool {
        words(stretch).all(|(chunk, word, mask)| {
            let place = match self.chunks.get(self.latest) {
                Some((number, _)) if *number == chunk => Ok(self.latest),
                _ => self.chunks.binary_search_by_key(&chunk, |(number, _)| *number),
            };
            place.is_err() || place.is_ok_and(|at| self.chunks[at].1[word] & mask == 0)
        })
    }

    /// The bits of a chunk; `None` if there are too many, or there is no memory for more.
    #[inline]
    fn chunk(&mut self, chunk: usize) -> Option<&mut [u64]> {
        if self.chunks.get(self.latest).is_none_or(|(number, _)| *number != chunk) {
            self.latest = match self.chunks.binary_search_by_key(&chunk, |(number, _)| *number) {
                Ok(at) => at,
                Err(_) if self.chunks.len() == self.most => return None,
                Err(at) => {
                    let bits = memory::filled(0, LINES_PER_CHUNK / 64).ok()?;
                    self.chunks.try_reserve(1).ok()?;
                    self.chunks.insert(at, (chunk, bits.into_boxed_slice()));
                    at
                }
            };
        }
        Some(&mut self.chunks[self.latest].1)
    }
}

/// Stretches of memory that come nearly in order.
///
/// What was made in order lies in order, in a few long runs of ascending addresses; these are short to sort.
#[derive(Debug)]
pub struct Stretches {
    runs: Vec<Range<usize>>,
    /// How many runs may be kept; none once that has become too many, or a stretch was empty.
    most: usize,
}

impl Stretches {
    /// No stretch yet; of more than `most` runs it will not be told whether they are apart.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { runs: Vec::new(), most }
    }

    /// Adds a stretch. Computes in **O(1)** time.
    #[inline]
    pub fn add(&mut self, stretch: Range<usize>) {
        if self.most == 0 {
            return;
        }
        if let Some(last) = self.runs.last_mut()
            && stretch.start >= last.end
            && !stretch.is_empty()
        {
            last.end = stretch.end;
        } else {
            let is_told = !stretch.is_empty() && self.runs.len() < self.most;
            if !is_told || memory::push(&mut self.runs, stretch).is_err() {
                *self = Self::new(0);
            }
        }
    }

    /// Whether no stretch is empty, and no two share a byte; `false` also if it cannot be told.
    ///
    /// Computes in **O(n log n)** time of the number of runs.
    #[must_use]
    pub fn are_apart(&self) -> bool {
        let Ok(mut runs) = memory::collect(self.runs.iter().cloned()) else {
            return false;
        };
        runs.sort_unstable_by_key(|run| run.start);
        self.most > 0 && runs.windows(2).all(|pair| pair[0].end <= pair[1].start)
    }
}

/// The bits of the lines that a stretch reaches into: the number of the chunk, that of the word in it, and a mask.
#[inline]
fn words(stretch: Range<usize>) -> impl Iterator<Item = (usize, usize, u64)> {
    let (mut line, end) =
        if stretch.is_empty() { (0, 0) } else { (stretch.start / LINE, (stretch.end - 1) / LINE + 1) };
    std::iter::from_fn(move || {
        if line >= end {
            return None;
        }
        let first = line;
        // The lines up to the end of this word, or to the last.
        let last = (end - 1).min(first | 63);
        line = last + 1;
        let mask = (u64::MAX >> (63 - (last - first))) << (first % 64);
        Some((first / LINES_PER_CHUNK, first % LINES_PER_CHUNK / 64, mask))
    })
}
