//! What has changed from one piece of packed names to another, where that is little.
//!
//! ```text
//! magic      8 bytes      "pdrd", 0, 0, 0, and 1, the version of the layout
//! counts     2 u64        names that are removed; names that have another id
//! removed    u32 each     their places among the old names, ascending; padded to 8 bytes
//! moved      u32 each     their places among the old names, ascending; padded to 8 bytes
//! ids        u64 each     the new ids of those
//! packed     the rest     the new header, and the names that were added behind the others: see [`archive`]
//! ```
//!
//! So names may be removed anywhere and added at the end, as dictionaries do. After another change of the order nearly
//! all names are removed and added again; then the new names themselves are smaller.

use crate::error::{Damage, Error, Result};
use crate::memory;
use crate::names::codec::{self, Encoder};

/// What the bytes begin with.
pub const MAGIC: [u8; 8] = *b"pdrd\0\0\0\x01";

/// The bytes from which [`apply`] makes `new` again, given `old`. **O(n)**.
///
/// # Errors
///
/// [`Error::Damaged`] if one of the two is no packed names; [`Error::TooLarge`] if there are 2^32 names or more;
/// [`Error::Memory`].
pub fn diff(old: &[u8], new: &[u8]) -> Result<Vec<u8>> {
    let (_, before) = codec::decode(old)?;
    let (header, after) = codec::decode(new)?;
    let mut removed = Vec::new();
    let mut moved = Vec::new();
    let mut ids = Vec::new();
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
    for places in [&removed, &moved] {
        bytes.extend(places.iter().flat_map(|at| at.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    let added = || after.iter().skip(kept);
    let added_ids: Vec<u64> = memory::collect(added().map(|(_, id)| id))?;
    let mut encoder = Encoder::new(&header, added_ids.len(), Some(added_ids.into_iter()), 0)?;
    for (name, _) in added() {
        encoder.push(name)?;
    }
    memory::append(&mut bytes, &encoder.finish())?;
    Ok(bytes)
}

/// The new names, made of the old ones and what [`diff`] gave. **O(n)**.
///
/// What comes out has been checked as [`codec::decode`] checks.
///
/// # Errors
///
/// [`Error::Damaged`] if one of the two is damaged, or they do not belong together; [`Error::Memory`].
pub fn apply(old: &[u8], delta: &[u8]) -> Result<Vec<u8>> {
    let (_, before) = codec::decode(old)?;
    let wrong = |at: usize, what| Error::Damaged { at: at as u64, what };
    if !delta.starts_with(&MAGIC) {
        return Err(wrong(0, Damage::Magic));
    }
    let mut at = 8_usize;
    let mut take = |count: u64, size: u64| {
        let start = at;
        let size = count.checked_mul(size).and_then(|size| usize::try_from(size).ok());
        let end = size.and_then(|size| start.checked_add(size)).filter(|end| *end <= delta.len());
        let end = end.ok_or(wrong(start, Damage::Ends { wanted: count }))?;
        at = end.next_multiple_of(8).min(delta.len());
        Ok((start, &delta[start..end]))
    };
    let mut counts = numbers(take(2, 8)?.1);
    let (of_removed, of_moved) = (counts.next().unwrap_or(0), counts.next().unwrap_or(0));
    let removed = Places::new(take(of_removed, 4)?, before.len())?;
    let moved = Places::new(take(of_moved, 4)?, before.len())?;
    let ids = take(of_moved, 8)?.1;
    let (header, added) = codec::decode(&delta[at..]).map_err(|error| match error {
        Error::Damaged { at: inside, what } => wrong(at + inside as usize, what),
        other => other,
    })?;
    let mut removed = removed.iter().peekable();
    let mut moved = moved.iter().zip(numbers(ids)).peekable();
    let mut names: Vec<&[u8]> = memory::with_capacity(before.len() + added.len())?;
    let mut new_ids: Vec<u64> = memory::with_capacity(before.len() + added.len())?;
    for (place, (name, id)) in before.iter().enumerate() {
        let other = moved.next_if(|(moved, _)| *moved as usize == place).map(|(_, id)| id);
        if removed.next_if(|removed| *removed as usize == place).is_none() {
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

/// Ascending places among names.
struct Places<'a>(&'a [u8]);

impl<'a> Places<'a> {
    fn new((start, bytes): (usize, &'a [u8]), names: usize) -> Result<Self> {
        let places = Self(bytes);
        let mut least = 0;
        for (number, at) in places.iter().enumerate() {
            if u64::from(at) < least || at as usize >= names {
                return Err(Error::Damaged { at: (start + 4 * number) as u64, what: Damage::Place });
            }
            least = u64::from(at) + 1;
        }
        Ok(places)
    }

    fn iter(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.0.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().expect("these are four")))
    }
}

fn put(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend(number.to_le_bytes());
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> + use<'_> {
    bytes.chunks_exact(8).map(|eight| u64::from_le_bytes(eight.try_into().expect("these are eight")))
}
