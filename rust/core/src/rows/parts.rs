//! Rows that lie in several parts, numbered from the first part to the last one: copied out of them, and added to them.
//!
//! The row behind the last one is nowhere: a copy of it is of zeros, and what is added to it is gone.

use crate::error::{Error, Result};
use crate::memory;
use crate::row_steps::Real;

/// Copies rows of `width` bytes, one behind the other. **O(all rows of the parts + rows)**.
///
/// Of widths that are common, each row is copied without a call.
///
/// # Errors
///
/// [`Error::Row`] if there is no such row, [`Error::Length`] if `out` has another length, [`Error::Memory`]. What was
/// written before stays.
pub(crate) fn copy_from_parts(parts: &[&[u8]], width: usize, rows: &[i64], out: &mut [u8]) -> Result<()> {
    let expected = rows.len().checked_mul(width).ok_or(Error::TooLarge)?;
    if out.len() != expected {
        return Err(Error::Length { expected, got: out.len() });
    }
    match width {
        0 => Ok(()),
        4 => copy_exactly::<4>(parts, rows, out),
        8 => copy_exactly::<8>(parts, rows, out),
        16 => copy_exactly::<16>(parts, rows, out),
        32 => copy_exactly::<32>(parts, rows, out),
        64 => copy_exactly::<64>(parts, rows, out),
        128 => copy_exactly::<128>(parts, rows, out),
        256 => copy_exactly::<256>(parts, rows, out),
        _ => {
            let zeros = memory::filled(0, width)?;
            let all = parts.iter().flat_map(|part| part.chunks_exact(width)).chain([&zeros[..]]);
            let all = listed(count(parts, width), all)?;
            for (to, row) in out.chunks_exact_mut(width).zip(rows) {
                to.copy_from_slice(all[at(*row, all.len())?]);
            }
            Ok(())
        }
    }
}

fn copy_exactly<const WIDTH: usize>(parts: &[&[u8]], rows: &[i64], out: &mut [u8]) -> Result<()> {
    let all = parts.iter().flat_map(|part| part.as_chunks().0).chain([&[0; WIDTH]]);
    let all = listed(count(parts, WIDTH), all)?;
    for (to, row) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(rows) {
        *to = *all[at(*row, all.len())?];
    }
    Ok(())
}

/// Adds rows of `elements` numbers to rows of the parts, in order. **O(all rows of the parts + numbers)**.
///
/// # Errors
///
/// [`Error::Row`] if there is no such row, [`Error::Length`] if there are not as many rows as are given,
/// [`Error::Memory`]. What was added before stays.
pub(crate) fn add_to_parts<T: Real>(parts: Vec<&mut [u8]>, elements: usize, rows: &[i64], given: &[T]) -> Result<()> {
    let expected = rows.len().checked_mul(elements).ok_or(Error::TooLarge)?;
    if given.len() != expected {
        return Err(Error::Length { expected, got: given.len() });
    }
    if elements == 0 {
        return Ok(());
    }
    let width = elements * size_of::<T>();
    let of_parts = parts.iter().map(|part| part.len() / width).sum::<usize>();
    let mut all = listed(of_parts, parts.into_iter().flat_map(|part| part.chunks_exact_mut(width)))?;
    for (numbers, row) in given.chunks_exact(elements).zip(rows) {
        if let Some(to) = all.get_mut(at(*row, of_parts + 1)?) {
            for (bytes, number) in to.chunks_exact_mut(size_of::<T>()).zip(numbers) {
                let sum = bytemuck::pod_read_unaligned::<T>(bytes) + *number;
                bytes.copy_from_slice(bytemuck::bytes_of(&sum));
            }
        }
    }
    Ok(())
}

fn count(parts: &[&[u8]], width: usize) -> usize {
    1 + parts.iter().map(|part| part.len() / width).sum::<usize>()
}

fn listed<T>(count: usize, rows: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut all = memory::with_capacity(count)?;
    all.extend(rows);
    Ok(all)
}

fn at(row: i64, count: usize) -> Result<usize> {
    usize::try_from(row).ok().filter(|at| *at < count).ok_or(Error::Row { row, capacity: count as u64 - 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTHS: [usize; 11] = [1, 3, 4, 8, 12, 16, 32, 64, 128, 256, 300];

    fn bytes(rows: usize, width: usize) -> Vec<u8> {
        (0..rows * width).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    #[test]
    fn rows_of_any_width_are_copied_from_any_part() {
        for width in WIDTHS {
            let all = bytes(5, width);
            let (first, last) = all.split_at(2 * width);
            let rows = [4, 0, 5, 1, 2, 4];
            let mut out = vec![9; rows.len() * width];
            copy_from_parts(&[first, &[], last], width, &rows, &mut out).unwrap();
            let with_zeros = [all, vec![0; width]].concat();
            for (row, found) in rows.iter().zip(out.chunks_exact(width)) {
                assert_eq!(found, &with_zeros[usize::try_from(*row).unwrap() * width..][..width]);
            }
        }
        copy_from_parts(&[&[], &[]], 0, &[0, 3], &mut []).unwrap();
    }

    #[test]
    fn numbers_are_added_in_order_wherever_their_rows_lie() {
        let given: Vec<f32> = (0..18u8).map(|n| f32::from(n).exp() - 3.0).collect();
        let rows = [1, 3, 1, 0, 4, 1];
        let mut all = vec![0.0; 12];
        for (numbers, row) in given.chunks(3).zip(rows).filter(|(_, row)| *row < 4) {
            let begin = 3 * usize::try_from(row).unwrap();
            all[begin..begin + 3].iter_mut().zip(numbers).for_each(|(to, number): (&mut f32, _)| *to += number);
        }
        let mut memory = [0; 1 + 4 * 12];
        // Bytes need not lie where numbers must.
        let (first, last) = memory[1..].split_at_mut(12);
        add_to_parts(vec![first, last], 3, &rows, &given).unwrap();
        assert_eq!(memory[1..], *bytemuck::cast_slice::<f32, u8>(&all));
        let mut memory = [0; 16];
        add_to_parts(vec![&mut memory[..]], 1, &[1, 1], &[1.5, f64::MIN_POSITIVE]).unwrap();
        assert_eq!(memory[..], [0.0_f64.to_ne_bytes(), 1.5_f64.to_ne_bytes()].concat());
        add_to_parts(vec![&mut memory[..]], 0, &[1, 7], &[0.0_f32; 0]).unwrap();
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for width in [3, 4] {
            let (all, mut out) = (bytes(2, width), vec![0; width]);
            for row in [3, -1, i64::MAX, i64::MIN] {
                let refused = Err(Error::Row { row, capacity: 2 });
                assert_eq!(copy_from_parts(&[&all], width, &[row], &mut out), refused);
                let given = vec![0.0_f32; width];
                assert_eq!(add_to_parts(vec![&mut bytes(2, 4 * width)], width, &[row], &given), refused);
            }
            let other = Err(Error::Length { expected: 2 * width, got: width });
            assert_eq!(copy_from_parts(&[&all], width, &[0, 1], &mut out), other);
            assert_eq!(add_to_parts(vec![], width, &[0, 1], &vec![0.0_f32; width]), other);
        }
    }
}
