//! Packed names in another order, such as that of the buckets which their hashes put them into.

use super::codec::{Encoder, Header, Names, hash};
use crate::error::{Error, Result};
use crate::memory;

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
    let mut begin = 0;
    let mut next: Vec<u64> = memory::collect(counts.iter().map(|count| {
        begin += count;
        begin - count
    }))?;
    let mut order = memory::filled(0_u64, bucket_of.len())?;
    for (at, bucket) in bucket_of.iter().enumerate() {
        let place = &mut next[*bucket as usize];
        order[*place as usize] = at as u64;
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
    use crate::names::codec::{Table, decode};

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
    fn what_cannot_be_is_refused() {
        let data = packed(&["a", "b"]);
        let (header, names) = decode(&data).unwrap();
        assert!(matches!(by_bucket(&names, 0), Err(Error::TooLarge)));
        assert!(matches!(reordered(&names, &header, &[2], &[0]), Err(Error::TooLarge)));
        assert!(matches!(reordered(&names, &header, &[0, 1], &[0]), Err(Error::TooLarge)));
    }
}
