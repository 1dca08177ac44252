//! How strided elements lie in memory: arithmetic on shapes and strides, as torch does it.
//!
//! Shapes and strides count elements, and no stride is negative, as in torch. A [`Loop`] is one dimension in bytes;
//! dimensions that go on where the next inner one ends have become one.

use std::ops::Range;

/// One dimension of a strided region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loop {
    /// The number of elements.
    pub count: u64,
    /// The distance between two, in bytes.
    pub step: u64,
}

/// Whether elements in C order are neighbours in memory.
#[must_use]
#[inline]
pub fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    for (size, stride) in shape.iter().zip(strides).rev() {
        if *size != 1 && *stride != expected {
            return false;
        }
        expected *= size;
    }
    true
}

/// How many elements lie from the first of a tensor to the last; `None` if a stride is negative or the sum too large.
#[must_use]
pub fn extent(shape: &[i64], strides: &[i64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0_u64;
    for (size, stride) in shape.iter().zip(strides) {
        let steps = u64::try_from(size - 1).ok()?;
        last = last.checked_add(steps.checked_mul(u64::try_from(*stride).ok()?)?)?;
    }
    last.checked_add(1).filter(|extent| i64::try_from(*extent).is_ok())
}

/// The dimensions from the outermost to the innermost, as torch orders them when it preserves the memory format.
#[must_use]
pub fn order_of(shape: &[i64], strides: &[i64]) -> Vec<usize> {
    // An insertion sort from the innermost on, in which a stride of 0 compares with nothing and so does not move.
    let mut inner_first: Vec<usize> = (0..shape.len()).rev().collect();
    for start in 1..inner_first.len() {
        let mut at = start;
        for before in (0..start).rev() {
            let (one, other) = (inner_first[before], inner_first[at]);
            if strides[one] == 0 || strides[other] == 0 {
                continue;
            }
            if strides[one] > strides[other] || (strides[one] == strides[other] && shape[one] > shape[other]) {
                inner_first.swap(before, at);
                at = before;
            } else if strides[one] < strides[other] {
                break;
            }
        }
    }
    inner_first.reverse();
    inner_first
}

/// Whether the elements fill a stretch of memory.
#[must_use]
pub fn is_dense(shape: &[i64], strides: &[i64], order: &[usize]) -> bool {
    let shape: Vec<_> = order.iter().map(|dim| shape[*dim]).collect();
    let strides: Vec<_> = order.iter().map(|dim| strides[*dim]).collect();
    is_contiguous(&shape, &strides)
}

/// Sets the strides to those of elements that fill a stretch of memory in this order.
pub fn make_dense(shape: &[i64], strides: &mut [i64], order: &[usize]) {
    let mut stride = 1;
    for dim in order.iter().rev() {
        strides[*dim] = stride;
        stride *= shape[*dim].max(1);
    }
}

/// The loops over elements of `itemsize` bytes in C order of `order`, from the outermost to the innermost.
///
/// None if the elements are neighbours in that order.
#[must_use]
pub fn loops(shape: &[i64], strides: &[i64], order: &[usize], itemsize: u64) -> Vec<Loop> {
    let mut loops: Vec<Loop> = Vec::with_capacity(order.len());
    for &dim in order {
        let (count, step) = (shape[dim].cast_unsigned(), strides[dim].cast_unsigned().wrapping_mul(itemsize));
        match loops.last_mut() {
            _ if count == 0 => return Vec::new(),
            _ if count == 1 => {}
            // The outer dimension goes on where the inner one ends: both are one.
            Some(outer) if outer.step == count.wrapping_mul(step) => *outer = Loop { count: outer.count * count, step },
            _ => loops.push(Loop { count, step }),
        }
    }
    if matches!(loops[..], [only] if only.step == itemsize) {
        loops.clear();
    }
    loops
}

/// Calls `each` for every row of the innermost loop, or part of one, that the elements in C order lie in.
///
/// It gets the distance of its first element from that of the region, in bytes, and the number of elements.
pub fn for_each_row(loops: &[Loop], elements: Range<u64>, mut each: impl FnMut(u64, u64)) {
    let Some((inner, outer)) = loops.split_last() else {
        return;
    };
    let (mut left, mut row) = (elements.end - elements.start, elements.start / inner.count);
    let mut column = elements.start % inner.count;
    let mut index = vec![0; outer.len()];
    for (index, each) in index.iter_mut().zip(outer).rev() {
        *index = row % each.count;
        row /= each.count;
    }
    while left > 0 {
        let count = left.min(inner.count - column);
        let offset: u64 = index.iter().zip(outer).map(|(index, each)| index * each.step).sum();
        each(offset + column * inner.step, count);
        left -= count;
        column = 0;
        for (index, each) in index.iter_mut().zip(outer).rev() {
            *index += 1;
            if *index < each.count {
                break;
            }
            *index = 0;
        }
    }
}

/// Whether two elements may share memory: false only if each loop steps over all that the smaller ones reach.
#[must_use]
pub fn may_fold(loops: &[Loop], itemsize: u64) -> bool {
    let mut sorted = loops.to_vec();
    sorted.sort_unstable_by_key(|each| each.step);
    let mut reach = itemsize;
    for each in sorted {
        if each.step < reach {
            return true;
        }
        reach += (each.count - 1) * each.step;
    }
    false
}
