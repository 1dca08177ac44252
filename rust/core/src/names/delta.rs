//! The difference between two pieces of packed names, which is small if few names changed.
//!
//! ```text
//! magic      8 bytes      "pdrd", 0, 0, 0, and 2, the version of the format
//! counts     2 u64        names that are removed; names that have another id
//! removed    u32 each     their positions among the old names, ascending; padded to 8 bytes
//! moved      u32 each     their positions among the old names, ascending; padded to 8 bytes
//! ids        u64 each     the new ids of those
//! packed     the rest     the new header, and the names that were added at the end: see [`codec`]
//! ```
//!
//! Names may be removed anywhere and added at the end, as dictionaries do. After another change of the order nearly all
//! names are removed and added again. Then the new names themselves are smaller.

use super::codec::{self, Encoder};
use super::header::{Reader, damaged, numbers, put, short_numbers};
use crate::error::{Damage, Error, Result};
use crate::memory;

/// The first bytes of a delta: the format and its version.
pub const MAGIC: [u8; 8] = *b"pdrd\0\0\0\x02";

/// The delta from which [`apply`] makes `new` again, without its words, given `old`. **O(n)**.
///
/// # Errors
///
/// [`Error::Damaged`] if one of the two is not packed names; [`Error::TooLarge`] if there are 2^32 names or more;
/// [`Error::Memory`].
pub fn diff(old: &[u8], new: &[u8]) -> Result<Vec<u8>> {
    let (_, before) = codec::decode(old)?;
    let (header, after) = codec::decode(new)?;
    let (mut removed, mut moved, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    let mut next = after.iter().peekable();
    let mut kept = 0;
    for (at, (name, id)) in before.iter().enumerate() {
        let at = u32::try_from(at).map_err(|_| Error::TooLarge)?;
        match next.next_if(|(other, _)| *other == name) {
            None => memory::push(&mut removed, at)?,
            Some((_, new_id)) => {
                kept += 1;
                if new_id != id {
                    memory::push(&mut moved, at)?;
                    memory::push(&mut ids, new_id)?;
                }
            }
        }
    }
    let mut bytes = memory::with_capacity(8 + 16 + 4 * (removed.len() + moved.len()) + 16 + 8 * ids.len())?;
    bytes.extend(MAGIC);
    put(&mut bytes, removed.len() as u64);
    put(&mut bytes, moved.len() as u64);
    for positions in [&removed, &moved] {
        bytes.extend(positions.iter().flat_map(|at| at.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    for id in ids {
        put(&mut bytes, id);
    }
    let added = || after.iter().skip(kept);
    let added_ids: Vec<u64> = memory::collect(added().map(|(_, id)| id))?;
    let mut encoder = Encoder::new(&header, added_ids.len(), Some(added_ids.into_iter()), 0)?;
    for (name, _) in added() {
        encoder.push(name)?;
    }
    memory::append(&mut bytes, &encoder.finish())?;
    Ok(bytes)
}

/// The new names without words, made from the old ones and a delta. **O(n)**.
///
/// The result is checked as [`codec::decode`] checks.
///
/// # Errors
///
/// [`Error::Damaged`] if one of the two is damaged, or they do not belong together; [`Error::Memory`].
pub fn apply(old: &[u8], delta: &[u8]) -> Result<Vec<u8>> {
    let (_, before) = codec::decode(old)?;
    let mut reader = Reader { data: delta, at: 0 };
    if reader.many(8, 1)? != MAGIC {
        return Err(damaged(0, Damage::Magic));
    }
    let (of_removed, of_moved) = (reader.number()?, reader.number()?);
    let removed = positions(&mut reader, of_removed, before.len())?;
    let moved = positions(&mut reader, of_moved, before.len())?;
    let ids = reader.many(of_moved, 8)?;
    let start = reader.at;
    let (header, added) = codec::decode(reader.rest()).map_err(|error| match error {
        Error::Damaged { at, what } => damaged(start + at as usize, what),
        other => other,
    })?;
    let mut removed = short_numbers(removed).peekable();
    let mut moved = short_numbers(moved).zip(numbers(ids)).peekable();
    let mut names: Vec<&[u8]> = memory::with_capacity(before.len() + added.len())?;
    let mut new_ids: Vec<u64> = memory::with_capacity(before.len() + added.len())?;
    for (at, (name, id)) in before.iter().enumerate() {
        let other = moved.next_if(|(moved, _)| *moved as usize == at).map(|(_, id)| id);
        if removed.next_if(|removed| *removed as usize == at).is_none() {
            names.push(name);
            new_ids.push(other.unwrap_or(id));
        }
    }
    for (name, id) in added.iter() {
        names.push(name);
        new_ids.push(id);
    }
    let plain = new_ids.iter().enumerate().all(|(at, id)| at as u64 == *id);
    let listed = (!plain).then_some(new_ids);
    let text = names.iter().map(|name| name.len()).sum();
    let mut encoder = Encoder::new(&header, names.len(), listed.map(IntoIterator::into_iter), text)?;
    for name in names {
        encoder.push(name)?;
    }
    let bytes = encoder.finish();
    codec::decode(&bytes)?;
    Ok(bytes)
}

/// Reads so many ascending positions among names, and the padding after them.
fn positions<'a>(reader: &mut Reader<'a>, count: u64, names: usize) -> Result<&'a [u8]> {
    let start = reader.at;
    let found = reader.many(count, 4)?;
    let mut least = 0;
    for (number, at) in short_numbers(found).enumerate() {
        if u64::from(at) < least || at as usize >= names {
            return Err(damaged(start + 4 * number, Damage::Place));
        }
        least = u64::from(at) + 1;
    }
    reader.padding()?;
    Ok(found)
}
