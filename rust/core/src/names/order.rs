//! Packed names in another order, such as that of the buckets which their hashes put them into.

use super::codec::{Encoder, Header, Names, hash};
use super::header::put_at;
use super::table::NameTable;
use crate::error::{Error, Result};
use crate::memory;
use crate::rows::Place;

/// Names in the order of their buckets, packed, with rows that ascend.
#[derive(Debug)]
pub struct Sorted {
    /// The packed names, without words. The rows of each table have the order of its names.
    pub packed: Vec<u8>,
    /// How many names each bucket has.
    pub counts: Vec<u64>,
    /// For each table and each row that it has in the packed names, the row of this name in the table.
    pub rows: Vec<Vec<i64>>,
}

/// All names in the order of their buckets, `hash % buckets`. Names of one bucket keep their order. **O(n + buckets)**.
///
/// Two walks over the names: the first counts, so that the second puts each where it belongs.
///
/// # Errors
///
/// [`Error::TooLarge`] if there are no buckets, or a name has a table that the header has not; [`Error::Memory`].
pub fn sorted_by_bucket(names: &NameTable, header: &Header, buckets: u32) -> Result<Sorted> {
    let mut counts = memory::filled(0_u64, buckets as usize)?;
    let mut bytes = memory::filled(0, buckets as usize)?;
    let mut header = header.clone();
    header.tables.iter_mut().for_each(|table| table.used = 0);
    let mut bucket_of = memory::with_capacity(names.len())?;
    for (name, place) in names.iter() {
        let bucket = hash(name).checked_rem(u64::from(buckets)).ok_or(Error::TooLarge)? as usize;
        counts[bucket] += 1;
        bytes[bucket] += name.len();
        header.tables.get_mut(place.table()).ok_or(Error::TooLarge)?.used += 1;
        bucket_of.push(bucket as u32);
    }
    let mut next = begins(counts.iter().map(|count| *count as usize))?;
    let mut next_byte = begins(bytes.iter().copied())?;

    let is_plain = header.tables.iter().skip(1).all(|table| table.used == 0);
    let listed = if is_plain { 0 } else { names.len() };
    let mut packed = header.encode(names.len(), listed)?;
    let (ids_at, text) = (packed.len(), bytes.iter().sum::<usize>());
    memory::resize(&mut packed, ids_at + 8 * (listed + names.len()) + text, 0)?;
    let (ids, ends) = packed[ids_at..].split_at_mut(8 * listed);
    let (ends, text) = ends.split_at_mut(8 * names.len());
    // The places of the names in the dictionary; where all are in the first table, the rows.
    let mut places = memory::filled(0, names.len())?;
    for ((name, place), bucket) in names.iter().zip(bucket_of) {
        let (slot, byte) = (&mut next[bucket as usize], &mut next_byte[bucket as usize]);
        let end = *byte + name.len();
        text[*byte..end].copy_from_slice(name);
        put_at(ends, *slot, end as u64);
        places[*slot] = if is_plain { place.row() } else { place.id() }.cast_signed();
        (*slot, *byte) = (*slot + 1, end);
    }

    let mut rows: Vec<Vec<i64>> = memory::with_capacity(header.tables.len())?;
    for table in &header.tables {
        rows.push(memory::with_capacity(if is_plain { 0 } else { table.used as usize })?);
    }
    if is_plain {
        rows.first_mut().into_iter().for_each(|of_table| *of_table = std::mem::take(&mut places));
    }
    for (at, id) in places.into_iter().enumerate() {
        let Some(place) = Place::of_id(id.cast_unsigned()) else { continue };
        let of_table = &mut rows[place.table()];
        let moved = Place::new(place.table(), of_table.len() as u64).unwrap_or(place);
        put_at(ids, at, moved.id());
        of_table.push(place.row().cast_signed());
    }
    Ok(Sorted { packed, counts, rows })
}

/// Where each of some parts begins, by their lengths.
fn begins(lengths: impl Iterator<Item = usize>) -> Result<Vec<usize>> {
    let mut end = 0;
    memory::collect(lengths.map(|length| {
        end += length;
        end - length
    }))
}

/// The places of names in the order of their buckets, `hash % buckets`, and how many names each bucket has. Names of one
/// bucket keep their order. **O(n + buckets)**.
///
/// # Errors
///
/// [`Error::TooLarge`] if there are no buckets; [`Error::Memory`].
pub fn by_bucket(names: &Names<'_>, buckets: u32) -> Result<(Vec<u64>, Vec<u64>)> {
    let mut counts = memory::filled(0_u64, buckets as usize)?;
    let mut bucket_of = memory::with_capacity(names.len())?;
    for (name, _) in names.iter() {
        let bucket = hash(name).checked_rem(u64::from(buckets)).ok_or(Error::TooLarge)?;
        counts[bucket as usize] += 1;
        memory::push(&mut bucket_of, bucket as u32)?;
    }
    let mut next = begins(counts.iter().map(|count| *count as usize))?;
    let mut order = memory::filled(0_u64, bucket_of.len())?;
    for (at, bucket) in bucket_of.iter().enumerate() {
        let place = &mut next[*bucket as usize];
        order[*place] = at as u64;
        *place += 1;
    }
    Ok((order, counts))
}

/// Some of the names in another order, packed after a header with new ids, without words. **O(n)**.
///
/// # Errors
///
/// [`Error::TooLarge`] if a place is outside of the names, or there are not as many ids as places; [`Error::Memory`].
pub fn reordered(names: &Names<'_>, header: &Header, order: &[u64], ids: &[u64]) -> Result<Vec<u8>> {
    if order.len() != ids.len() {
        return Err(Error::TooLarge);
    }
    let name_at = |at: &u64| usize::try_from(*at).ok().and_then(|at| names.name(at)).ok_or(Error::TooLarge);
    let is_plain = ids.iter().enumerate().all(|(at, id)| at as u64 == *id);
    let listed = (!is_plain).then(|| ids.iter().copied());
    let mut text = 0;
    for at in order {
        text += name_at(at)?.len();
    }
    let mut encoder = Encoder::new(header, order.len(), listed, text)?;
    for at in order {
        encoder.push(name_at(at)?)?;
    }
    Ok(encoder.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::codec::{Parts, Table, decode};

    fn packed(names: &[&str]) -> Vec<u8> {
        let used = names.len() as u64;
        let header = Header {
            tables: vec![Table { attribute: b"t".to_vec(), group: 0, trainable: true, used }],
            patterns: Vec::new(),
        };
        let mut encoder = Encoder::new(&header, names.len(), None::<std::iter::Empty<u64>>, 0).unwrap();
        for name in names {
            encoder.push(name.as_bytes()).unwrap();
        }
        encoder.finish()
    }

    #[test]
    fn names_of_a_bucket_keep_their_order_and_buckets_ascend() {
        let texts: Vec<String> = (0..500).map(|at| format!("name/{at}")).collect();
        let data = packed(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let (header, names) = decode(&data).unwrap();
        let (order, counts) = by_bucket(&names, 7).unwrap();
        let keys: Vec<(u64, u64)> = order.iter().map(|at| (hash(texts[*at as usize].as_bytes()) % 7, *at)).collect();
        assert!(keys.is_sorted());
        assert_eq!(counts.iter().sum::<u64>(), 500);
        assert_eq!(counts[3], keys.iter().filter(|(bucket, _)| *bucket == 3).count() as u64);
        let plain: Vec<u64> = (0..500).collect();
        let other = reordered(&names, &header, &order, &plain).unwrap();
        let (_, found) = decode(&other).unwrap();
        assert!(found.iter().zip(&order).all(|((name, _), at)| name == texts[*at as usize].as_bytes()));
        let ids: Vec<u64> = (0..500).rev().collect();
        let (_, again) = (decode(&other).unwrap(), reordered(&found, &header, &ids, &ids).unwrap());
        assert_eq!(decode(&again).unwrap().1.iter().next().unwrap().1, 499);
    }

    #[test]
    fn a_table_of_names_is_sorted_as_its_packed_names_are() {
        for tables in 1..3 {
            let mut index = NameTable::default();
            let texts: Vec<String> = (0..500).map(|at| format!("name/{}", at * at)).collect();
            for (at, text) in texts.iter().enumerate() {
                // Rows descend, and some have no name.
                let place = Place::new(at % tables, (1000 - 2 * at) as u64).unwrap();
                assert!(index.insert_new(text.as_str(), place).unwrap());
            }
            let table =
                |number: usize| Table { attribute: vec![b'a', number as u8], group: 0, trainable: true, used: 9 };
            let header = Header { tables: (0..tables).map(table).collect(), patterns: vec![b"p".to_vec()] };
            let sorted = sorted_by_bucket(&index, &header, 7).unwrap();
            let (read, names) = decode(&sorted.packed).unwrap();
            assert_eq!(read.patterns, header.patterns);
            assert_eq!(read.tables.iter().map(|table| table.used).sum::<u64>(), 500);

            let mut encoder = Encoder::new(&header, 500, None::<std::iter::Empty<u64>>, 0).unwrap();
            for text in &texts {
                encoder.push(text.as_bytes()).unwrap();
            }
            let plain = encoder.finish();
            let (order, counts) = by_bucket(&Parts::of(&plain).unwrap().1.names(&plain).unwrap(), 7).unwrap();
            assert_eq!(sorted.counts, counts);
            let expected: Vec<&[u8]> = order.iter().map(|at| texts[*at as usize].as_bytes()).collect();
            assert_eq!(names.iter().map(|(name, _)| name).collect::<Vec<_>>(), expected);
            for (name, id) in names.iter() {
                let (old, new) = (index.get(name).unwrap(), Place::of_id(id).unwrap());
                assert_eq!(old.table(), new.table());
                assert_eq!(sorted.rows[new.table()][new.row() as usize], old.row().cast_signed());
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let data = packed(&["a", "b"]);
        let (header, names) = decode(&data).unwrap();
        assert!(matches!(by_bucket(&names, 0), Err(Error::TooLarge)));
        let mut one = NameTable::default();
        assert!(one.insert_new("a", Place::new(1, 0).unwrap()).unwrap());
        assert!(matches!(sorted_by_bucket(&one, &header, 0), Err(Error::TooLarge)));
        assert!(matches!(sorted_by_bucket(&one, &header, 7), Err(Error::TooLarge)));
        assert!(matches!(reordered(&names, &header, &[2], &[0]), Err(Error::TooLarge)));
        assert!(matches!(reordered(&names, &header, &[0, 1], &[0]), Err(Error::TooLarge)));
    }
}
