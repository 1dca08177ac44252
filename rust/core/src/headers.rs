//! What a rank tells the others in front of the data for them, and how it reads what they tell.
//!
//! ```text
//!   message   [header | data for rank 0] [header | data for rank 2]    of rank 1, whose own data goes nowhere
//!   header    call call call | status | payload payload payload payload      eight numbers of 8 bytes
//!   windows   [header | data of rank 0 ....] [header | data of rank 2 ....]  as long as any message may be
//!   told      [status | payload]  of each rank
//! ```
//!
//! The last two bits of the status in a header say whether the rank has failed, and whether its data comes later, because
//! it does not fit into a window.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::memory;
use crate::row_steps::Real;
use crate::rows::parts::{add_to_parts, copy_from_parts};

/// The numbers that say what a rank is about to do.
pub const CALL: usize = 3;
/// The numbers that a call adds for each rank.
pub const PAYLOAD: usize = 4;
/// The numbers that are told of each rank.
pub const TOLD: usize = 1 + PAYLOAD;
/// Where what is told of a rank says how many bytes it sends to who reads it, unless a call says something else there.
pub const BYTES_AT: usize = 3;
/// The bytes of a header.
pub const BYTES: usize = NUMBER * (CALL + TOLD);

const NUMBER: usize = 8;
const FAILED: i64 = 1;
const LATER: i64 = 2;
const FLAGS: u32 = 2;

/// What a rank is about to do, in numbers.
pub type Call = [i64; CALL];

/// The place of a rank among the ranks of a group.
#[derive(Debug, Clone, Copy)]
pub struct Headers {
    /// This rank.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

/// What a call adds to the headers.
#[derive(Debug)]
pub enum Payload<'a> {
    /// Numbers for all ranks. With `give`, the third becomes the bytes for each.
    ForAll([i64; PAYLOAD]),
    /// Numbers for each rank, `[ranks, PAYLOAD]`.
    ForEach(&'a [i64]),
}

/// What goes to the other ranks.
#[derive(Debug)]
pub struct Message {
    /// Headers and data, those for the first rank first.
    pub bytes: Vec<u8>,
    /// How many bytes are for each rank.
    pub sizes: Vec<usize>,
    /// `[ranks, TOLD]`: what the rank tells itself; zeros for the others until [`Headers::read`].
    pub told: Vec<i64>,
}

/// What all ranks have told.
#[derive(Debug, PartialEq, Eq)]
pub enum Meeting {
    /// They do the same. Whose data comes later; nobody's if empty.
    Agreed(Vec<bool>),
    /// One is about to do something else.
    Differs,
    /// One has failed.
    Failed,
}

impl Headers {
    /// Writes what goes to the other ranks. **O(ranks + bytes)**.
    ///
    /// `data` has `give[r]` bytes for each rank `r`, and `room` is the length of a window. Without data, no bytes follow
    /// the headers.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if the payload, `give` or the data has another length; [`Error::Memory`].
    pub fn message(
        &self,
        call: Call,
        (status, has_failed): (i64, bool),
        payload: &Payload<'_>,
        data: Option<&[u8]>,
        give: Option<&[usize]>,
        room: usize,
    ) -> Result<Message> {
        if let (Some(data), Some(give)) = (data, give) {
            same_length(give.iter().sum(), data.len())?;
        }
        let is_later = data.is_some() && !self.fits(give.unwrap_or_default(), room);
        let data = data.filter(|_| !is_later && !has_failed);
        let flags = if is_later { LATER } else { 0 } | if has_failed { FAILED } else { 0 };
        self.written(call, (status << FLAGS) | flags, payload, give, data.is_some(), |bytes, part| {
            bytes.extend_from_slice(data.map_or(&[][..], |data| &data[part]));
        })
    }

    /// Writes what goes to the other ranks if it is sums of rows; returns also the sums for this rank. **O(ranks +
    /// bytes)**.
    ///
    /// Row `m` of `given` is added to row `rows[m]` of the sums. They begin as zeros, and `give[r]` bytes of them are for
    /// each rank `r`, the first ones for rank 0. What is added to the row behind the last one goes nowhere.
    ///
    /// # Errors
    ///
    /// [`Error::Row`] if there is no such row; [`Error::Length`] if there are not as many rows as numbers of them, or if the
    /// sums do not fit into windows of `room` bytes; [`Error::Memory`].
    pub fn message_of_sums<T: Real>(
        &self,
        call: Call,
        payload: [i64; PAYLOAD],
        (elements, rows, given): (usize, &[i64], &[T]),
        give: &[usize],
        room: usize,
    ) -> Result<(Message, Vec<u8>)> {
        self.check(give.len())?;
        if !self.fits(give, room) {
            return Err(Error::Length { expected: room, got: BYTES + give.iter().max().unwrap_or(&0) });
        }
        let mut own = memory::filled(0, give[self.rank])?;
        let mut message = self.written(call, 0, &Payload::ForAll(payload), Some(give), true, |bytes, part| {
            bytes.resize(bytes.len() + part.len(), 0);
        })?;
        let (mut others, mut of_own) = (&mut message.bytes[..], &mut own[..]);
        let mut parts = memory::with_capacity(self.ranks)?;
        for (rank, count) in give.iter().enumerate() {
            parts.push(if rank == self.rank {
                std::mem::take(&mut of_own)
            } else {
                &mut others.split_off_mut(..BYTES + count).unwrap_or_default()[BYTES..]
            });
        }
        add_to_parts(parts, elements, rows, given)?;
        Ok((message, own))
    }

    /// Writes headers, and what `write` adds for each other rank, of which it is told the bytes of all data.
    fn written(
        &self,
        call: Call,
        status: i64,
        payload: &Payload<'_>,
        give: Option<&[usize]>,
        has_data: bool,
        mut write: impl FnMut(&mut Vec<u8>, Range<usize>),
    ) -> Result<Message> {
        let is_given = give.is_some();
        let nothing = if is_given { Vec::new() } else { memory::filled(0, self.ranks)? };
        let give = give.unwrap_or(&nothing);
        self.check(give.len())?;
        if let Payload::ForEach(numbers) = payload {
            same_length(PAYLOAD * self.ranks, numbers.len())?;
        }
        let behind = |count: usize| if has_data { count } else { 0 };
        let others = give.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        let all = others.map(|(_, count)| BYTES + behind(*count)).sum();
        let mut message = Message {
            bytes: memory::with_capacity(all)?,
            sizes: memory::filled(0, self.ranks)?,
            told: memory::filled(0, TOLD * self.ranks)?,
        };
        let mut begin = 0;
        for (rank, count) in give.iter().enumerate() {
            let part = begin..begin + behind(*count);
            begin = part.end;
            let numbers = match payload {
                Payload::ForAll([first, second, _, last]) if is_given => {
                    [*first, *second, (*count as u64).cast_signed(), *last]
                }
                Payload::ForAll(numbers) => *numbers,
                Payload::ForEach(numbers) => std::array::from_fn(|at| numbers[PAYLOAD * rank + at]),
            };
            if rank == self.rank {
                let told = &mut message.told[TOLD * rank..TOLD * (rank + 1)];
                told[0] = status;
                told[1..].copy_from_slice(&numbers);
                continue;
            }
            for number in call.iter().chain([&status]).chain(&numbers) {
                message.bytes.extend_from_slice(&number.to_le_bytes());
            }
            message.sizes[rank] = BYTES + part.len();
            write(&mut message.bytes, part);
        }
        Ok(message)
    }

    /// Whether so many bytes for each other rank fit behind headers.
    fn fits(&self, give: &[usize], room: usize) -> bool {
        give.iter().enumerate().all(|(rank, count)| rank == self.rank || count + BYTES <= room)
    }

    /// Reads what the others have told into `told`, beside what this rank tells. **O(ranks)**.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if there are not as many windows or numbers as ranks; [`Error::Memory`].
    pub fn read(&self, windows: &[u8], call: Call, told: &mut [i64]) -> Result<Meeting> {
        same_length(TOLD * self.ranks, told.len())?;
        let (mut differs, mut failed, mut any_later) = (false, false, false);
        for (rank, row) in told.chunks_exact_mut(TOLD).enumerate() {
            if rank != self.rank {
                let window = self.window(windows, rank, 0)?;
                let mut numbers = window.chunks_exact(NUMBER).map(|eight| {
                    eight.try_into().map_or(0, i64::from_le_bytes) // they are eight
                });
                differs |= !call.iter().all(|number| numbers.next() == Some(*number));
                row.iter_mut().zip(numbers).for_each(|(to, number)| *to = number);
            }
            failed |= row[0] & FAILED != 0;
            any_later |= row[0] & LATER != 0;
        }
        let of_later = told.chunks_exact(TOLD).filter(|_| any_later).map(|row| row[0] & LATER != 0);
        let later = memory::collect(of_later)?;
        told.chunks_exact_mut(TOLD).for_each(|row| row[0] >>= FLAGS);
        Ok(if differs {
            Meeting::Differs
        } else if failed {
            Meeting::Failed
        } else {
            Meeting::Agreed(later)
        })
    }

    /// Does what [`Self::read`] does, and then what [`Self::receive`] does, if all agree and `take[r]` bytes have come of
    /// each rank `r`; says whether it has.
    ///
    /// With `rows`, it does not write all bytes one behind the other, but rows of so many bytes, by their numbers. The row
    /// behind the last one is of zeros.
    ///
    /// # Errors
    ///
    /// As for both; [`Error::Row`] if there is no such row.
    #[expect(clippy::too_many_arguments, reason = "they are those of both")]
    pub fn read_and_receive(
        &self,
        windows: &[u8],
        call: Call,
        told: &mut [i64],
        own: &[u8],
        take: &[usize],
        rows: Option<(usize, &[i64])>,
        into: &mut [u8],
    ) -> Result<(Meeting, bool)> {
        let found = self.read(windows, call, told)?;
        let have_come = found == Meeting::Agreed(Vec::new())
            && told
                .chunks_exact(TOLD)
                .map(|row| row[BYTES_AT])
                .eq(take.iter().map(|count| (*count as u64).cast_signed()));
        if have_come {
            match rows {
                Some((width, rows)) => {
                    copy_from_parts(&self.parts(windows, own, take, &[], &[])?, width, rows, into)?;
                }
                None => self.receive(windows, own, take, &[], &[], into)?,
            }
        }
        Ok((found, have_come))
    }

    /// Writes `take[r]` bytes of each rank `r`, one behind the other. **O(ranks + bytes)**.
    ///
    /// `own` is what this rank has for itself. `later` says whose data has come later, and `of_later` is that.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if there is less, or if `into` has another length.
    pub fn receive(
        &self,
        windows: &[u8],
        own: &[u8],
        take: &[usize],
        later: &[bool],
        of_later: &[u8],
        mut into: &mut [u8],
    ) -> Result<()> {
        self.check(take.len())?;
        same_length(take.iter().sum(), into.len())?;
        for part in self.parts(windows, own, take, later, of_later)? {
            let (to, others) = into.split_at_mut(part.len());
            to.copy_from_slice(part);
            into = others;
        }
        Ok(())
    }

    /// What has come of each rank: `take[r]` bytes of rank `r`.
    fn parts<'a>(
        &self,
        windows: &'a [u8],
        own: &'a [u8],
        take: &[usize],
        later: &[bool],
        mut of_later: &'a [u8],
    ) -> Result<Vec<&'a [u8]>> {
        self.check(take.len())?;
        let mut parts = memory::with_capacity(self.ranks)?;
        for (rank, count) in take.iter().enumerate() {
            parts.push(if later.get(rank) == Some(&true) {
                let (part, others) = of_later.split_at_checked(*count).ok_or(short(*count, of_later))?;
                of_later = others;
                part
            } else if rank == self.rank {
                own.get(..*count).ok_or(short(*count, own))?
            } else {
                &self.window(windows, rank, *count)?[BYTES..]
            });
        }
        Ok(parts)
    }

    /// The header of another rank, and so many bytes behind it.
    fn window<'a>(&self, windows: &'a [u8], rank: usize, count: usize) -> Result<&'a [u8]> {
        let room = windows.len() / (self.ranks - 1);
        let begin = room * (rank - usize::from(rank > self.rank));
        windows[begin..begin + room].get(..BYTES + count).ok_or(Error::Length { expected: BYTES + count, got: room })
    }

    fn check(&self, length: usize) -> Result<()> {
        same_length(self.ranks, length)
    }
}

fn short(expected: usize, bytes: &[u8]) -> Error {
    Error::Length { expected, got: bytes.len() }
}

fn same_length(expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { expected, got }) }
}
