//! The index of a file in shards, `{"metadata":{...},"weight_map":{"name":"file",...}}`: which name is in which.
//!
//! The Hugging Face tools write one line for each name. So it is read as a header is: a name costs its bytes and a few
//! numbers. What an index says of a shard is compared with the shard's own header in one sweep.

use std::collections::HashMap;
use std::fmt;

use super::error::Where;
use super::scanner::Scanner;
use super::{Fault, Header, words_of};
use crate::error::Error;
use crate::hash_table::{MAX_ENTRIES, Words};
use crate::memory;
use crate::names::table::stored_hash;

/// Why an index is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum IndexError {
    /// It is no JSON, or lists something twice.
    Unreadable {
        /// What is wrong.
        fault: Fault,
        /// The byte where it was noticed.
        at: usize,
    },
    /// It does not say where names are.
    NoWeightMap,
    /// It says of a name that it is in something that is no string.
    NoFile,
}

impl fmt::Display for IndexError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { fault, at } => {
                write!(f, "the index cannot be read: ")?;
                match fault {
                    Fault::NotUtf8 => write!(f, "it is not in UTF-8")?,
                    Fault::Ends => write!(f, "it ends within a string")?,
                    Fault::Trailing => write!(f, "something follows its end")?,
                    Fault::Duplicate => write!(f, "a name is listed twice")?,
                    _ => write!(f, "{fault}")?,
                }
                write!(f, " (byte {at})")
            }
            Self::NoWeightMap => write!(f, "the index has no 'weight_map'"),
            Self::NoFile => write!(f, "the index names something that is no file"),
        }
    }
}

impl std::error::Error for IndexError {}

impl From<Where> for IndexError {
    fn from(Where { fault, at }: Where) -> Self {
        Self::Unreadable { fault, at }
    }
}

/// Which name is in which shard; names and shards are numbered in their order, shards by their first names.
#[derive(Default)]
pub struct ShardIndex {
    names: String,
    /// Where each name ends in the names of all.
    ends: Vec<usize>,
    shard_of: Vec<u32>,
    shards: Vec<String>,
    metadata: String,
    words: Words,
}

impl ShardIndex {
    /// Reads an index. **O(n)**.
    ///
    /// # Errors
    ///
    /// If it is damaged, or of another kind.
    pub fn read(text: &[u8]) -> Result<Self, IndexError> {
        let text =
            std::str::from_utf8(text).map_err(|error| Where { fault: Fault::NotUtf8, at: error.valid_up_to() })?;
        let scanner = &mut Scanner::new(text);
        let buffer = &mut String::new();
        let mut found = Self::default();
        let mut has_map = false;
        scanner.skip_space();
        if scanner.take(b'{') {
            let mut first = true;
            while scanner.next_element(first, b'}')? {
                first = false;
                scanner.skip_space();
                let at = scanner.position();
                let key = scanner.string(buffer)?.to_owned();
                scanner.expect(b':')?;
                scanner.skip_space();
                let begin = scanner.position();
                if key == "weight_map" && scanner.take(b'{') {
                    if std::mem::replace(&mut has_map, true) {
                        return Err(Where { fault: Fault::Duplicate, at }.into());
                    }
                    found.read_map(scanner)?;
                    continue;
                }
                scanner.skip_value(buffer)?;
                if key == "metadata" {
                    found.metadata.clear();
                    let metadata = scanner.between(begin, scanner.position());
                    memory::append_text(&mut found.metadata, metadata)
                        .map_err(|_| Where { fault: Fault::Memory, at })?;
                }
            }
        } else {
            scanner.skip_value(buffer)?;
        }
        if !scanner.at_end() {
            return Err(Where { fault: Fault::Trailing, at: scanner.position() }.into());
        }
        if has_map { Ok(found) } else { Err(IndexError::NoWeightMap) }
    }

    fn read_map(&mut self, scanner: &mut Scanner<'_>) -> Result<(), IndexError> {
        let (mut name, mut shard) = (String::new(), String::new());
        let mut numbers: HashMap<String, u32> = HashMap::new();
        let mut places = Vec::new();
        let mut first = true;
        while scanner.next_element(first, b'}')? {
            first = false;
            scanner.skip_space();
            let at = scanner.position();
            memory::push(&mut places, at).map_err(|_| Where { fault: Fault::Memory, at })?;
            if places.len() > MAX_ENTRIES {
                return Err(Where { fault: Fault::Full(MAX_ENTRIES), at: scanner.position() }.into());
            }
            memory::append_text(&mut self.names, scanner.string(&mut name)?)
                .and_then(|()| memory::push(&mut self.ends, self.names.len()))
                .and_then(|()| self.shard_of.try_reserve(1).map_err(|_| Error::Memory))
                .and_then(|()| self.shards.try_reserve(1).map_err(|_| Error::Memory))
                .and_then(|()| numbers.try_reserve(1).map_err(|_| Error::Memory))
                .map_err(|_| Where { fault: Fault::Memory, at })?;
            scanner.expect(b':')?;
            let at = scanner.position();
            if !scanner.take(b'"') {
                scanner.skip_value(&mut shard)?;
                return Err(IndexError::NoFile);
            }
            scanner.go_back(at);
            let shard = scanner.string(&mut shard)?;
            // Most often it is that of the name before.
            let number = match self.shard_of.last() {
                Some(last) if self.shards[*last as usize] == shard => *last,
                _ => *numbers.entry(shard.to_owned()).or_insert_with(|| {
                    self.shards.push(shard.to_owned());
                    self.shards.len() as u32 - 1
                }),
            };
            self.shard_of.push(number);
        }
        self.words = words_of(self.len(), |number| self.name(number))
            .map_err(|(twice, fault)| Where { fault, at: places.get(twice).copied().unwrap_or(0) })?;
        Ok(())
    }

    /// The number of names. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The name of a number. **O(1)**.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    #[must_use]
    pub fn name(&self, number: usize) -> &str {
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.names[start..self.ends[number]]
    }

    /// The number of the shard that each name is in.
    #[must_use]
    pub fn shard_of(&self) -> &[u32] {
        &self.shard_of
    }

    /// The files, whatever they are called.
    #[must_use]
    pub fn shards(&self) -> &[String] {
        &self.shards
    }

    /// What stands beside the names, as JSON; empty if there is nothing.
    #[must_use]
    pub fn metadata(&self) -> &str {
        &self.metadata
    }

    /// The number of the shard that a name is in. **O(1)**.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<u32> {
        if self.is_empty() {
            return None;
        }
        let slot = self.words.search(stored_hash(name.as_bytes()), |number| self.name(number as usize) == name).ok()?;
        Some(self.shard_of[self.words.id(slot) as usize])
    }

    /// The first name that is not in the header of its shard, and the number of that. **O(n)**.
    #[must_use]
    pub fn missing(&self, headers: &[&Header]) -> Option<(u32, &str)> {
        let mut listed = self.shard_of.iter().enumerate().map(|(number, shard)| (*shard, self.name(number)));
        listed.find(|(shard, name)| headers.get(*shard as usize).is_none_or(|header| header.find(name).is_none()))
    }
}
