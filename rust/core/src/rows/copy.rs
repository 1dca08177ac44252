//! Copies of rows, by their numbers.

use crate::error::{Error, Result};

/// Copies rows of a table to where there is room for them, one behind the other; -1 stands for a row of zeros. **O(m)**.
///
/// Of widths that are common, each row is copied without a call. So the processor loads many rows at a time.
///
/// # Errors
///
/// [`Error::TooLarge`] if the table has no such row, or there is not just as much room. What was written before stays.
pub fn copy_rows(table: &[u8], width: usize, rows: &[i64], out: &mut [u8]) -> Result<()> {
    if rows.len().checked_mul(width) != Some(out.len()) {
        return Err(Error::TooLarge);
    }
    match width {
        0 => Ok(()),
        1 => copy::<1>(table, rows, out),
        2 => copy::<2>(table, rows, out),
        4 => copy::<4>(table, rows, out),
        8 => copy::<8>(table, rows, out),
        16 => copy::<16>(table, rows, out),
        32 => copy::<32>(table, rows, out),
        64 => copy::<64>(table, rows, out),
        128 => copy::<128>(table, rows, out),
        256 => copy::<256>(table, rows, out),
        _ => {
            for (to, row) in out.chunks_exact_mut(width).zip(rows) {
                let begin = usize::try_from(*row).unwrap_or_default().checked_mul(width);
                let from = begin.and_then(|begin| table.get(begin..)?.get(..width));
                write(to, from, *row)?;
            }
            Ok(())
        }
    }
}

fn copy<const WIDTH: usize>(table: &[u8], rows: &[i64], out: &mut [u8]) -> Result<()> {
    let table = table.as_chunks::<WIDTH>().0;
    for (to, row) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(rows) {
        match usize::try_from(*row).ok().and_then(|row| table.get(row)) {
            Some(from) => *to = *from,
            None => write(to, None, *row)?,
        }
    }
    Ok(())
}

fn write(to: &mut [u8], from: Option<&[u8]>, row: i64) -> Result<()> {
    match from {
        _ if row == -1 => to.fill(0),
        Some(from) if row >= 0 => to.copy_from_slice(from),
        _ => return Err(Error::TooLarge),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_width_come_in_the_order_of_their_numbers() {
        for width in [1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 300] {
            let table: Vec<u8> = (0..5 * width).map(|at| at as u8).collect();
            let rows = [4, 0, -1, 4, 2];
            let mut out = vec![7; rows.len() * width];
            copy_rows(&table, width, &rows, &mut out).unwrap();
            for (row, found) in rows.iter().zip(out.chunks_exact(width)) {
                let own = usize::try_from(*row).map(|row| &table[row * width..][..width]);
                assert_eq!(found, own.unwrap_or(&[0; 300][..width]));
            }
        }
        copy_rows(&[], 0, &[0, 3], &mut []).unwrap();
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for width in [3, 4] {
            let (table, mut out) = (vec![0; 2 * width], vec![0; width]);
            for row in [2, -2, i64::MAX, i64::MIN] {
                assert!(matches!(copy_rows(&table, width, &[row], &mut out), Err(Error::TooLarge)));
            }
            assert!(matches!(copy_rows(&table, width, &[0, 1], &mut out), Err(Error::TooLarge)));
            assert!(matches!(copy_rows(&table, width, &[], &mut out), Err(Error::TooLarge)));
        }
    }
}
