//! Lists that grow with what a caller asks for: where memory runs out there is an error, and the process goes on.
//!
//! The collections of the standard library end the process instead. So whatever may be large is made here, before
//! anything is changed.

use std::collections::VecDeque;

use crate::error::{Error, Result};

/// So many zeros are not worth two calls of the allocator.
const LARGE: usize = 1 << 16;

/// An empty list with room for so many items.
///
/// # Errors
///
/// [`Error::Memory`].
pub fn with_capacity<T>(capacity: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, capacity)?;
    Ok(list)
}

/// Makes room for so many more items, and no more than that.
///
/// # Errors
///
/// [`Error::Memory`]; the list is as it was.
pub fn reserve<T>(list: &mut Vec<T>, additional: usize) -> Result<()> {
    list.try_reserve_exact(additional).map_err(|_| Error::Memory)
}

/// Adds an item; the list grows by doubling.
///
/// # Errors
///
/// [`Error::Memory`]; the list is as it was.
#[inline]
pub fn push<T>(list: &mut Vec<T>, item: T) -> Result<()> {
    if list.len() == list.capacity() {
        list.try_reserve(1).map_err(|_| Error::Memory)?;
    }
    list.push(item);
    Ok(())
}

/// Adds items; the list grows by doubling.
///
/// # Errors
///
/// [`Error::Memory`]; the list is as it was.
#[inline]
pub fn append<T: Copy>(list: &mut Vec<T>, items: &[T]) -> Result<()> {
    list.try_reserve(items.len()).map_err(|_| Error::Memory)?;
    list.extend_from_slice(items);
    Ok(())
}

/// Adds items; the list becomes just as long as it must.
///
/// # Errors
///
/// [`Error::Memory`]; the list is as it was.
pub fn append_exact<T: Copy>(list: &mut Vec<T>, items: &[T]) -> Result<()> {
    reserve(list, items.len())?;
    list.extend_from_slice(items);
    Ok(())
}

/// Adds a text; the string grows by doubling.
///
/// # Errors
///
/// [`Error::Memory`]; the string is as it was.
#[inline]
pub fn append_text(string: &mut String, text: &str) -> Result<()> {
    string.try_reserve(text.len()).map_err(|_| Error::Memory)?;
    string.push_str(text);
    Ok(())
}

/// Makes a list as long as that; new items are `item`.
///
/// # Errors
///
/// [`Error::Memory`]; the list is as it was.
pub fn resize<T: Copy>(list: &mut Vec<T>, len: usize, item: T) -> Result<()> {
    list.try_reserve(len.saturating_sub(list.len())).map_err(|_| Error::Memory)?;
    list.resize(len, item);
    Ok(())
}

/// A list of so many times the same.
///
/// # Errors
///
/// [`Error::Memory`].
pub fn filled<T: Copy>(item: T, len: usize) -> Result<Vec<T>> {
    let mut list = with_capacity(len)?;
    list.resize(len, item);
    Ok(list)
}

/// A list of so many zeros.
///
/// Large ones come from the system as zeros. The standard library has no way to ask for them that may fail; so as much is
/// asked for first, and given back. Another thread might take it in between.
///
/// # Errors
///
/// [`Error::Memory`].
pub fn zeros(len: usize) -> Result<Vec<u64>> {
    if len < LARGE {
        return filled(0, len);
    }
    drop(with_capacity::<u64>(len)?);
    Ok(vec![0; len])
}

/// A list of all items.
///
/// # Errors
///
/// [`Error::Memory`].
pub fn collect<T>(items: impl IntoIterator<Item = T>) -> Result<Vec<T>> {
    let mut items = items.into_iter();
    let mut list = with_capacity(items.size_hint().0)?;
    items.try_for_each(|item| push(&mut list, item))?;
    Ok(list)
}

/// Makes room in a deque for one item; it grows by doubling.
#[inline]
pub(crate) fn make_room<T>(deque: &mut VecDeque<T>) -> Result<()> {
    if deque.len() == deque.capacity() {
        deque.try_reserve(1).map_err(|_| Error::Memory)?;
    }
    Ok(())
}
