//! The header of a safetensors file: a million tensors read, checked and written at a cost per tensor that is that of a
//! dictionary.
//!
//! The header is JSON, `{"name":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},...}`, and comes from anywhere. What
//! is read here is kept in a few flat lists, and only if it describes the file. Then every byte of the data belongs to
//! exactly one tensor, every name is there once, and every size can be counted. Nothing is allocated that is larger
//! than a small multiple of the header itself, which is a part of the file.
//!
//! Stricter than the format: keys of the metadata must differ, and a tensor has at most [`MAX_DIMENSIONS`] dimensions.
//! More lenient: the header may be of any size, and spaces may stand anywhere that JSON allows.

mod coverage;
mod dtype;
mod error;
mod scanner;
mod shard_index;
mod stack;
mod write;

use std::collections::{HashMap, HashSet};

pub use dtype::Dtype;
pub use error::{Fault, HeaderError};
pub use shard_index::{IndexError, ShardIndex};
pub use stack::{Stack, Table};
pub use write::HeaderWriter;

use crate::error::Error;
use crate::hash_table::{MAX_ENTRIES, Words};
use crate::memory;
use crate::names::table::stored_hash;
use error::Where;
use scanner::Scanner;

/// The largest number of dimensions of a tensor; `NumPy` has the same limit, and torch's are mostly lower.
pub const MAX_DIMENSIONS: usize = 64;

/// The bytes in front of the header, which give its size.
pub const PREFIX: u64 = 8;

/// How many names are looked for ahead, as in a [`NameTable`](crate::names::table::NameTable).
const BATCH: usize = 32;

/// The characters of a name that an error shows.
const SHOWN: usize = 100;

/// What stands in the place of a tensor's name in front of the metadata.
pub const METADATA: &str = "__metadata__";

/// What tensors of one dtype and shape have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kind {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The size of each dimension.
    pub shape: Box<[u64]>,
    /// The bytes of one tensor.
    pub bytes: u64,
}

/// One tensor.
#[derive(Clone, Copy)]
struct Entry {
    /// Where its name ends in the names of all; it begins where the one before ends.
    name_end: usize,
    /// Where it begins in the data.
    start: u64,
    /// The number of its kind.
    kind: u32,
}

/// A header that has been read and describes its file; tensors are numbered in its order.
pub struct Header {
    names: String,
    entries: Vec<Entry>,
    kinds: Vec<Kind>,
    metadata: Vec<(String, String)>,
    words: Words,
    data_start: u64,
}

impl Header {
    /// The size of the header, from the first bytes of a file.
    ///
    /// # Errors
    ///
    /// If there are too few bytes, or the file has not room for it.
    pub fn size(prefix: &[u8], file_bytes: u64) -> Result<u64, HeaderError> {
        let fault = match prefix.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) {
            Some(said) if said <= file_bytes.saturating_sub(PREFIX) => return Ok(said),
            Some(said) => Fault::TooLong { said, file: file_bytes },
            None => Fault::TooShort(file_bytes),
        };
        Err(HeaderError { fault, at: 0, tensor: None })
    }

    /// Reads the header of a file.
    ///
    /// # Errors
    ///
    /// If it is damaged, or describes another file than one of so many bytes.
    ///
    /// **O(n)**, or **O(n log n)** where the tensors do not lie in the order of the header.
    pub fn read(header: &[u8], file_bytes: u64) -> Result<Self, HeaderError> {
        let data_start = PREFIX + header.len() as u64;
        let found = Self::empty(data_start);
        let mut reader = Reader { found, known: HashMap::new(), places: Vec::new(), repeated: None };
        let result = reader.read(header);
        let Reader { mut found, places, .. } = reader;
        if let Err((Where { fault, at }, about)) = result {
            let tensor = about.map(|name| shortened(&name));
            return Err(HeaderError { fault, at: PREFIX + at as u64, tensor });
        }
        let at = |number: usize| PREFIX + places[number] as u64;
        let refused = |(number, fault): (usize, Fault)| HeaderError {
            fault,
            at: at(number),
            tensor: Some(shortened(found.name(number))),
        };
        let data = file_bytes.saturating_sub(data_start);
        found.check_coverage(data).map_err(|(number, fault)| match number {
            Some(number) => refused((number, fault)),
            None => HeaderError { fault, at: data_start, tensor: None },
        })?;
        let words = words_of(found.len(), |number| found.name(number)).map_err(|(twice, fault)| match fault {
            Fault::Duplicate => refused((twice, fault)),
            _ => HeaderError { fault, at: data_start, tensor: None },
        })?;
        found.words = words;
        Ok(found)
    }

    fn empty(data_start: u64) -> Self {
        Self {
            names: String::new(),
            entries: Vec::new(),
            kinds: Vec::new(),
            metadata: Vec::new(),
            words: Words::default(),
            data_start,
        }
    }

    /// The number of tensors. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The byte of the file at which the data begin.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The texts of the metadata, in order.
    #[must_use]
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// The name of a tensor. **O(1)**.
    ///
    /// # Panics
    ///
    /// As all that asks for a tensor by its number, if there are fewer.
    #[must_use]
    pub fn name(&self, number: usize) -> &str {
        let start = number.checked_sub(1).map_or(0, |before| self.entries[before].name_end);
        &self.names[start..self.entries[number].name_end]
    }

    /// The dtype, shape and size of a tensor. **O(1)**.
    #[must_use]
    pub fn kind(&self, number: usize) -> &Kind {
        &self.kinds[self.entries[number].kind as usize]
    }

    /// All kinds of tensors that there are, in the order of their first tensors.
    #[must_use]
    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// The number of the kind of a tensor. **O(1)**.
    #[must_use]
    pub fn kind_number(&self, number: usize) -> usize {
        self.entries[number].kind as usize
    }

    /// The first byte of a tensor in the file, and the one behind its last. **O(1)**.
    #[must_use]
    pub fn bytes(&self, number: usize) -> (u64, u64) {
        let start = self.data_start + self.entries[number].start;
        (start, start + self.kind(number).bytes)
    }

    /// The number of the tensor of this name. **O(1)**.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        if self.is_empty() {
            return None;
        }
        let slot = self.words.search(stored_hash(name.as_bytes()), |number| self.name(number as usize) == name).ok()?;
        Some(self.words.id(slot) as usize)
    }
}

/// The table that finds names by their numbers, or the number of the first one that is listed twice.
fn words_of<'a>(count: usize, name: impl Fn(usize) -> &'a str) -> Result<Words, (usize, Fault)> {
    let mut words = Words::default();
    words.reserve(count).map_err(|error| (0, error.into()))?;
    let mut hashes = [0; BATCH];
    for first in (0..count).step_by(BATCH) {
        let batch = &mut hashes[..BATCH.min(count - first)];
        for (at, hash) in batch.iter_mut().enumerate() {
            *hash = stored_hash(name(first + at).as_bytes());
        }
        words.touch(batch.iter().copied());
        for (number, &hash) in (first..).zip(batch.iter()) {
            match words.search(hash, |other| name(other as usize) == name(number)) {
                Ok(_) => return Err((number, Fault::Duplicate)),
                Err(empty) => words.fill(empty, hash, number as u32),
            }
        }
    }
    Ok(words)
}

/// The beginning of a name: an error must not be as long as a header.
fn shortened(name: &str) -> String {
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

/// Reads a header from left to right.
struct Reader<'a> {
    found: Header,
    /// What stood between name and offsets of a tensor, and its kind: most often the next tensor's are the same.
    repeated: Option<(&'a str, u32)>,
    /// The numbers of the kinds.
    known: HashMap<Kind, u32>,
    /// The byte at which each tensor stands, for errors.
    places: Vec<usize>,
}

/// A fault, and the name of the tensor that was being read.
type Refused = (Where, Option<String>);

impl<'a> Reader<'a> {
    fn read(&mut self, header: &'a [u8]) -> Result<(), Refused> {
        let text = std::str::from_utf8(header)
            .map_err(|error| (Where { fault: Fault::NotUtf8, at: error.valid_up_to() }, None))?;
        if !text.starts_with('{') {
            return Err((Where { fault: Fault::NoHeader, at: 0 }, None));
        }
        let scanner = &mut Scanner::new(text);
        let buffer = &mut String::new();
        let mut has_metadata = false;
        let nameless = |error| (error, None);
        scanner.expect(b'{').map_err(nameless)?;
        let mut first = true;
        while scanner.next_element(first, b'}').map_err(nameless)? {
            first = false;
            scanner.skip_space();
            let at = scanner.position();
            let name = scanner.string(buffer).map_err(nameless)?;
            if name == METADATA {
                if std::mem::replace(&mut has_metadata, true) {
                    return Err((Where { fault: Fault::DuplicateMetadata, at }, None));
                }
                scanner.expect(b':').map_err(nameless)?;
                self.read_metadata(scanner).map_err(nameless)?;
                continue;
            }
            if self.places.len() == MAX_ENTRIES {
                return Err((Where { fault: Fault::Full(MAX_ENTRIES), at }, None));
            }
            let start = self.found.names.len();
            let added = memory::append_text(&mut self.found.names, name)
                .and_then(|()| memory::push(&mut self.places, at))
                .and_then(|()| self.found.entries.try_reserve(1).map_err(|_| Error::Memory));
            if let Err(error) = added {
                return Err((Where { fault: error.into(), at }, None));
            }
            match self.read_tensor(scanner, buffer) {
                Ok(entry) => self.found.entries.push(entry),
                Err(error) => return Err((error, Some(self.found.names[start..].to_owned()))),
            }
        }
        if !scanner.at_end() {
            return Err((Where { fault: Fault::Trailing, at: scanner.position() }, None));
        }
        Ok(())
    }

    fn read_metadata(&mut self, scanner: &mut Scanner<'_>) -> Result<(), Where> {
        if scanner.take_literal("null") {
            return Ok(());
        }
        let (mut key, mut value) = (String::new(), String::new());
        let mut seen = HashSet::new();
        scanner.expect(b'{')?;
        let mut first = true;
        while scanner.next_element(first, b'}')? {
            first = false;
            let at = scanner.position();
            let key = owned(scanner.string(&mut key)?, at)?;
            scanner.expect(b':')?;
            let value = owned(scanner.string(&mut value)?, at)?;
            if seen.try_reserve(1).is_err() || self.found.metadata.try_reserve(1).is_err() {
                return Err(Where { fault: Fault::Memory, at });
            }
            if !seen.insert(owned(&key, at)?) {
                return Err(Where { fault: Fault::DuplicateMetadata, at });
            }
            self.found.metadata.push((key, value));
        }
        Ok(())
    }

    /// Reads what stands behind a name.
    fn read_tensor(&mut self, scanner: &mut Scanner<'a>, buffer: &mut String) -> Result<Entry, Where> {
        if let Some(entry) = self.read_like_before(scanner) {
            return Ok(entry);
        }
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        let begin = scanner.position();
        scanner.expect(b':')?;
        scanner.expect(b'{')?;
        let mut first = true;
        // Where the offsets begin, if they are the last field.
        let mut last = None;
        while scanner.next_element(first, b'}')? {
            first = false;
            last = None;
            scanner.skip_space();
            let at = scanner.position();
            let twice = |field| Err(Where { fault: Fault::DuplicateField(field), at });
            match scanner.string(buffer)? {
                "dtype" => {
                    scanner.expect(b':')?;
                    scanner.skip_space();
                    let at = scanner.position();
                    let name = scanner.string(buffer)?;
                    let unknown = || Where { fault: Fault::Dtype(shortened(name)), at };
                    if dtype.replace(Dtype::from_name(name).ok_or_else(unknown)?).is_some() {
                        return twice("dtype");
                    }
                }
                "shape" => {
                    scanner.expect(b':')?;
                    if shape.replace((scanner.position(), Shape::read(scanner)?)).is_some() {
                        return twice("shape");
                    }
                }
                "data_offsets" => {
                    scanner.expect(b':')?;
                    last = Some(scanner.position());
                    if offsets.replace((scanner.position(), read_pair(scanner)?)).is_some() {
                        return twice("data_offsets");
                    }
                }
                _ => {
                    scanner.expect(b':')?;
                    scanner.skip_value(buffer)?;
                }
            }
        }
        let missing = |field| Where { fault: Fault::MissingField(field), at: begin };
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let (shape_at, shape) = shape.ok_or_else(|| missing("shape"))?;
        let (offsets_at, (start, stop)) = offsets.ok_or_else(|| missing("data_offsets"))?;
        let kind = self.kind_number(dtype, shape.sizes()).map_err(|fault| Where { fault, at: shape_at })?;
        let needed = self.found.kinds[kind as usize].bytes;
        if stop.checked_sub(start) != Some(needed) {
            return Err(Where { fault: Fault::Size { start, stop, needed }, at: offsets_at });
        }
        self.repeated = last.map(|end| (scanner.between(begin, end), kind));
        Ok(Entry { name_end: self.found.names.len(), start, kind })
    }

    /// Reads what stands behind a name if it differs from that of a tensor before in the offsets only.
    ///
    /// Nothing has been read if it does not, or if the offsets are wrong: that is for the long way to say.
    fn read_like_before(&self, scanner: &mut Scanner<'a>) -> Option<Entry> {
        let (like, kind) = self.repeated?;
        let begin = scanner.position();
        let bytes = self.found.kinds[kind as usize].bytes;
        if scanner.take_literal(like)
            && let Ok((start, stop)) = read_pair(scanner)
            && scanner.take(b'}')
            && stop.checked_sub(start) == Some(bytes)
        {
            return Some(Entry { name_end: self.found.names.len(), start, kind });
        }
        scanner.go_back(begin);
        None
    }

    fn kind_number(&mut self, dtype: Dtype, shape: &[u64]) -> Result<u32, Fault> {
        if let Some(last) = self.found.entries.last() {
            let kind = &self.found.kinds[last.kind as usize];
            if kind.dtype == dtype && *kind.shape == *shape {
                return Ok(last.kind);
            }
        }
        let kind = Kind { dtype, shape: shape.into(), bytes: dtype.bytes_of(shape)? };
        let next = self.found.kinds.len() as u32;
        self.known.try_reserve(1).map_err(|_| Fault::Memory)?;
        self.found.kinds.try_reserve(1).map_err(|_| Fault::Memory)?;
        let number = *self.known.entry(kind.clone()).or_insert(next);
        if number == next {
            self.found.kinds.push(kind);
        }
        Ok(number)
    }
}

fn owned(text: &str, at: usize) -> Result<String, Where> {
    let mut owned = String::new();
    memory::append_text(&mut owned, text).map_err(|_| Where { fault: Fault::Memory, at })?;
    Ok(owned)
}

/// A shape while it is read.
struct Shape {
    sizes: [u64; MAX_DIMENSIONS],
    len: usize,
}

impl Shape {
    fn read(scanner: &mut Scanner<'_>) -> Result<Self, Where> {
        let mut shape = Self { sizes: [0; MAX_DIMENSIONS], len: 0 };
        scanner.expect(b'[')?;
        while scanner.next_element(shape.len == 0, b']')? {
            if shape.len == MAX_DIMENSIONS {
                return scanner.fail(Fault::Dimensions);
            }
            shape.sizes[shape.len] = scanner.count()?;
            shape.len += 1;
        }
        Ok(shape)
    }

    fn sizes(&self) -> &[u64] {
        &self.sizes[..self.len]
    }
}

fn read_pair(scanner: &mut Scanner<'_>) -> Result<(u64, u64), Where> {
    scanner.expect(b'[')?;
    let start = scanner.count()?;
    scanner.expect(b',')?;
    let stop = scanner.count()?;
    scanner.expect(b']')?;
    Ok((start, stop))
}
