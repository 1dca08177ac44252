//! The tables and patterns of a dictionary, which are packed before its names.

use super::text::invalid_at;
use crate::error::{Damage, Error, Result};
use crate::memory;

/// The first bytes of packed names: the format and its version.
pub const MAGIC: [u8; 8] = *b"pdrs\0\0\0\x02";

/// The number of lower bits of an id that hold the row; the upper ones hold the table.
pub const ROW_BITS: u32 = 40;

/// The bytes of the magic number and the counts.
const START: usize = 8 + 6 * 8;

/// Where the number of words stands.
pub(super) const WORDS_AT: usize = START - 8;

/// The bytes of a table's record.
const RECORD: usize = 4 * 8;

/// What is packed besides names and ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The tables, in the order of their numbers.
    pub tables: Vec<Table>,
    /// The regular expressions for names that have parameter groups of their own.
    pub patterns: Vec<Vec<u8>>,
}

/// What is packed of one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// The attribute under which it is registered.
    pub attribute: Vec<u8>,
    /// The number of its parameter group.
    pub group: u64,
    /// Whether it requires gradients.
    pub trainable: bool,
    /// One more than the largest row number that was ever used.
    pub used: u64,
}

/// How much follows the header.
pub(super) struct Counts {
    pub(super) names: u64,
    pub(super) ids: u64,
    pub(super) words: u64,
}

impl Header {
    /// The bytes before the ids.
    pub(super) fn encode(&self, names: usize, ids: usize) -> Result<Vec<u8>> {
        let texts = || self.tables.iter().map(|table| &table.attribute).chain(&self.patterns);
        let labels: usize = texts().map(Vec::len).sum();
        let records = self.tables.len() * RECORD + self.patterns.len() * 8;
        let mut bytes = memory::with_capacity(START + records + labels + 8)?;
        bytes.extend(MAGIC);
        for count in [names, ids, self.tables.len(), self.patterns.len(), labels, 0] {
            put(&mut bytes, count as u64);
        }
        for table in &self.tables {
            for number in [table.attribute.len() as u64, table.group, table.trainable.into(), table.used] {
                put(&mut bytes, number);
            }
        }
        self.patterns.iter().for_each(|pattern| put(&mut bytes, pattern.len() as u64));
        texts().for_each(|text| bytes.extend(text));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Ok(bytes)
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<(Self, Counts)> {
        if reader.take(8)? != MAGIC {
            return Err(damaged(0, Damage::Magic));
        }
        let mut counts = [0; 6];
        for count in &mut counts {
            *count = reader.number()?;
        }
        let [names, ids, tables, patterns, labels, words] = counts;
        if ids != 0 && ids != names {
            return Err(damaged(16, Damage::Ids));
        }
        let records = reader.many(tables, RECORD)?;
        let sizes = reader.many(patterns, 8)?;
        let mut labels = Reader { at: reader.at, data: &reader.data[..reader.at + reader.many(labels, 1)?.len()] };
        reader.padding()?;
        let mut header = Self {
            tables: memory::with_capacity(records.len() / RECORD)?,
            patterns: memory::with_capacity(sizes.len() / 8)?,
        };
        for (number, record) in records.chunks_exact(RECORD).enumerate() {
            let mut fields = [0; 4];
            fields.iter_mut().zip(numbers(record)).for_each(|(field, number)| *field = number);
            let [attribute, group, trainable, used] = fields;
            if trainable > 1 || used > 1 << ROW_BITS {
                return Err(damaged(START + number * RECORD, Damage::Header));
            }
            let attribute = labels.text(attribute)?;
            header.tables.push(Table { attribute, group, trainable: trainable == 1, used });
        }
        for size in numbers(sizes) {
            header.patterns.push(labels.text(size)?);
        }
        if labels.at < labels.data.len() {
            return Err(damaged(labels.at, Damage::Header));
        }
        Ok((header, Counts { names, ids, words }))
    }
}

/// Takes bytes from the front, and never more than there are.
pub(super) struct Reader<'a> {
    pub(super) data: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(size).filter(|end| *end <= self.data.len());
        let Some(end) = end else {
            return Err(damaged(self.at, Damage::Ends { wanted: size as u64 }));
        };
        let taken = &self.data[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// Takes so many items of so many bytes.
    pub(super) fn many(&mut self, count: u64, size: usize) -> Result<&'a [u8]> {
        let bytes = count.checked_mul(size as u64).and_then(|bytes| usize::try_from(bytes).ok());
        self.take(bytes.unwrap_or(usize::MAX))
    }

    pub(super) fn number(&mut self) -> Result<u64> {
        let at = self.at;
        numbers(self.take(8)?).next().ok_or(damaged(at, Damage::Ends { wanted: 8 }))
    }

    fn text(&mut self, size: u64) -> Result<Vec<u8>> {
        let at = self.at;
        let text = self.many(size, 1)?;
        match invalid_at(text) {
            None => memory::collect(text.iter().copied()),
            Some(wrong) => Err(damaged(at + wrong, Damage::Text)),
        }
    }

    /// Takes the zeros up to a multiple of eight bytes.
    pub(super) fn padding(&mut self) -> Result<()> {
        let at = self.at;
        let padding = self.take(at.next_multiple_of(8) - at)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(damaged(at, Damage::Padding));
        }
        Ok(())
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        let rest = &self.data[self.at..];
        self.at = self.data.len();
        rest
    }
}

pub(super) fn put(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend(number.to_le_bytes());
}

/// Writes the number of 64 bits that stands so many of them behind the first.
pub(super) fn put_at(bytes: &mut [u8], number: usize, value: u64) {
    bytes[8 * number..8 * number + 8].copy_from_slice(&value.to_le_bytes());
}

/// Numbers of 64 bits.
pub(super) fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> + use<'_> {
    bytes.chunks_exact(8).map(|eight| u64::from_le_bytes(eight.try_into().expect("these are eight")))
}

/// Numbers of 32 bits.
pub(super) fn short_numbers(bytes: &[u8]) -> impl Iterator<Item = u32> + use<'_> {
    bytes.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().expect("these are four")))
}

pub(super) fn damaged(at: usize, what: Damage) -> Error {
    Error::Damaged { at: at as u64, what }
}
