//! How the names of a [`NameTable`](super::table::NameTable) lie in memory, one behind the other.
//!
//! ```text
//!   byte   0 .. 7    place    0 if the name is gone
//!          8         length   of the text, below 254; 255 if it stands in the next 4 bytes; 254 if the text lies
//!                             elsewhere, and the units of the record stand in the next 4 bytes
//!          9 ..      text     then zeros
//!          last      units    of 8 bytes that the record has, below 255; 255 if they stand in the 4 bytes in front
//! ```
//!
//! The length leads to the next record, the units at the end to the one before. All numbers are little-endian.

use crate::error::{Error, Result};
use crate::rows::Place;

/// A record is so many bytes long, or a multiple.
pub(super) const UNIT: usize = 8;

/// A name has fewer bytes.
pub(super) const LONGEST: usize = 1 << 28;

const LENGTH: usize = 8;
const TEXT: usize = 9;
const ELSEWHERE: u8 = 254;
const LONG: u8 = 255;

/// Most records are not longer.
const PIECE: usize = 64;

fn number(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 4].first_chunk().map_or(0, |number| u32::from_le_bytes(*number)) as usize
}

/// Where the text of a record begins, if it is of this length, and how many units there are.
#[inline]
fn form(length: usize) -> (usize, usize) {
    let text = if length < usize::from(ELSEWHERE) { TEXT } else { TEXT + 4 };
    let units = (text + length + 1).div_ceil(UNIT);
    if units < usize::from(LONG) { (text, units) } else { (text, (text + length + 5).div_ceil(UNIT)) }
}

/// How many units a record with a text of this length has.
///
/// # Errors
///
/// [`Error::Text`] if it is too long.
#[inline]
pub(super) fn units_for(length: usize) -> Result<usize> {
    if length < LONGEST { Ok(form(length).1) } else { Err(Error::Text { bytes: length as u64 }) }
}

/// How many bytes a record with this text has.
pub(super) fn size(text: &[u8]) -> usize {
    form(text.len()).1 * UNIT
}

/// Whether texts are the same. Those of 8 to 16 bytes are compared in two pieces: a call would take as long again.
#[inline]
pub(super) fn are_same(one: &[u8], other: &[u8]) -> bool {
    let ends = one.first_chunk::<8>().zip(one.last_chunk::<8>());
    match ends.zip(other.first_chunk::<8>().zip(other.last_chunk::<8>())) {
        Some((one_ends, other_ends)) if one.len() <= 16 => one.len() == other.len() && one_ends == other_ends,
        _ => one == other,
    }
}

/// Copies a text, as [`are_same`] compares.
#[inline]
fn copy(to: &mut [u8], text: &[u8]) {
    match text.first_chunk::<8>().zip(text.last_chunk::<8>()) {
        Some((first, last)) if text.len() <= 16 && to.len() == text.len() => {
            to[..8].copy_from_slice(first);
            let end = to.len() - 8;
            to[end..].copy_from_slice(last);
        }
        _ => to.copy_from_slice(text),
    }
}

/// Writes a record, for which there must be so many bytes.
#[inline]
fn fill(record: &mut [u8], place: Option<Place>, text: &[u8]) {
    let (begin, units) = form(text.len());
    record[..LENGTH].copy_from_slice(&place.map_or(0, Place::bits).to_le_bytes());
    if begin == TEXT {
        record[LENGTH] = text.len() as u8;
    } else {
        record[LENGTH] = LONG;
        record[TEXT..TEXT + 4].copy_from_slice(&(text.len() as u32).to_le_bytes());
    }
    copy(&mut record[begin..begin + text.len()], text);
    let end = units * UNIT - 1;
    if units < usize::from(LONG) {
        record[end] = units as u8;
    } else {
        record[end] = LONG;
        record[end - 4..end].copy_from_slice(&(units as u32).to_le_bytes());
    }
}

/// Adds a record to others, for which there should be room.
#[inline]
pub(super) fn push(records: &mut Vec<u8>, place: Option<Place>, text: &[u8]) {
    let begin = records.len();
    let end = begin + size(text);
    if end - begin <= PIECE && records.capacity() - begin >= PIECE {
        // So many bytes at a time are written without a call.
        records.extend_from_slice(&[0; PIECE]);
        records.truncate(end);
    } else {
        records.resize(end, 0);
    }
    fill(&mut records[begin..end], place, text);
}

/// Writes a record in front of others.
pub(super) fn fill_at(records: &mut [u8], at: usize, place: Option<Place>, text: &[u8]) {
    let record = &mut records[at..at + size(text)];
    record.fill(0);
    fill(record, place, text);
}

/// The text of the record at `at`; `None` if it lies elsewhere.
#[inline]
pub(super) fn text(records: &[u8], at: usize) -> Option<&[u8]> {
    let length = records[at + LENGTH];
    if length < ELSEWHERE {
        return Some(&records[at + TEXT..at + TEXT + usize::from(length)]);
    }
    let text = at + TEXT + 4;
    (length == LONG).then(|| &records[text..text + number(records, at + TEXT)])
}

/// How many units the record at `at` has.
#[inline]
pub(super) fn units(records: &[u8], at: usize) -> usize {
    match records[at + LENGTH] {
        LONG => form(number(records, at + TEXT)).1,
        ELSEWHERE => number(records, at + TEXT),
        length => form(usize::from(length)).1,
    }
}

/// How many units the record in front of `at` has.
#[inline]
pub(super) fn units_before(records: &[u8], at: usize) -> usize {
    match records[at - 1] {
        LONG => number(records, at - 5),
        units => usize::from(units),
    }
}

#[inline]
pub(super) fn place(records: &[u8], at: usize) -> Option<Place> {
    Place::of_bits(bits(records, at))
}

#[inline]
pub(super) fn bits(records: &[u8], at: usize) -> u64 {
    records[at..].first_chunk().map_or(0, |bits| u64::from_le_bytes(*bits))
}

#[inline]
pub(super) fn set_bits(records: &mut [u8], at: usize, bits: u64) {
    records[at..at + LENGTH].copy_from_slice(&bits.to_le_bytes());
}

/// Notes that the text of the record at `at` lies elsewhere.
pub(super) fn set_elsewhere(records: &mut [u8], at: usize) {
    let units = units(records, at) as u32;
    records[at + LENGTH] = ELSEWHERE;
    records[at + TEXT..at + TEXT + 4].copy_from_slice(&units.to_le_bytes());
}
