//! The names of many rows as bytes: what stands beside the tables in a state dict, and in an archive.
//!
//! ```text
//! magic      8 bytes      "pdrs", 0, 0, 0, and 1, the version of the layout
//! counts     6 u64        names; ids (as many, or 0); tables; patterns; dims; bytes of labels
//! tables     7 u64 each   bytes of the attribute; group; flags; rows used; bytes of the slab's name; offset; ndim
//! patterns   u64 each     bytes
//! dims       u64 each     the shapes of the rows of tables in slabs, one behind another
//! labels     bytes        of each table its attribute and its slab's name, then the patterns; padded to 8 bytes
//! ids        u64 each     table and row of each name, in order; none where the n-th name has row n of table 0
//! lengths    u32 each     bytes of each name; padded to 8 bytes
//! text       bytes        the names, one behind another
//! ```
//!
//! All numbers are little-endian; padding is zero. Flags are 1 for a trainable table and 2 for one whose data lies in a
//! slab. Texts are UTF-8 in which surrogates may stand, too, each in three bytes, as a Python `str` may hold them. An
//! id is the number of a table and, in the lower [`ROW_BITS`], a row of it.
//!
//! Nothing is believed: [`decode`] refuses, and says where, whatever [`Encoder`] does not write, and allocates no more
//! than a few times the size of what it was given.

use crate::error::{Damage, Error, Result};
use crate::hash_table::Words;
use crate::key::{Hashed, Matches};
use crate::memory;

/// What the bytes begin with.
pub const MAGIC: [u8; 8] = *b"pdrs\0\0\0\x01";

/// The bits of an id that tell the row.
pub const ROW_BITS: u32 = 40;

const TRAINABLE: u64 = 1;
const IN_SLAB: u64 = 2;

/// The bytes of a table's record.
const RECORD: usize = 7 * 8;

/// What there is to know of a dictionary beside its names and its data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The tables, in the order of their numbers.
    pub tables: Vec<Table>,
    /// The patterns of names that have groups of options of their own.
    pub patterns: Vec<Vec<u8>>,
}

/// What there is to know of one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// The name under which it is registered.
    pub attribute: Vec<u8>,
    /// The number of its group of options.
    pub group: u64,
    /// Whether it requires gradients.
    pub trainable: bool,
    /// One more than the largest row that was ever given.
    pub used: u64,
    /// Where its data lies, if not in a tensor of its own.
    pub slab: Option<Slab>,
}

/// A place in a one-dimensional tensor that many small tables share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slab {
    /// The name of the tensor.
    pub tensor: Vec<u8>,
    /// The element at which the first row begins.
    pub offset: u64,
    /// The shape of a row.
    pub shape: Vec<u64>,
}

/// Writes names behind a header, into one piece of memory.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    /// Where the length of the next name goes, and where those lengths end.
    length: usize,
    lengths_end: usize,
}

/// What stands in front of the ids.
fn encode_head(header: &Header, names: usize, ids: usize) -> Result<Vec<u8>> {
    let slabs = || header.tables.iter().filter_map(|table| table.slab.as_ref());
    let dims: usize = slabs().map(|slab| slab.shape.len()).sum();
    let labels: usize = header.tables.iter().map(|table| table.attribute.len()).sum::<usize>()
        + slabs().map(|slab| slab.tensor.len()).sum::<usize>()
        + header.patterns.iter().map(Vec::len).sum::<usize>();
    let records = header.tables.len() * RECORD + header.patterns.len() * 8;
    let mut bytes = memory::with_capacity(56 + records + 8 * dims + labels + 8)?;
    bytes.extend(MAGIC);
    for count in [names, ids, header.tables.len(), header.patterns.len(), dims, labels] {
        put(&mut bytes, count as u64);
    }
    for table in &header.tables {
        let (flag, name, offset, ndim) = match &table.slab {
            Some(slab) => (IN_SLAB, slab.tensor.len(), slab.offset, slab.shape.len()),
            None => (0, 0, 0, 0),
        };
        let flags = flag | if table.trainable { TRAINABLE } else { 0 };
        let record = [table.attribute.len() as u64, table.group, flags, table.used, name as u64, offset];
        record.into_iter().chain([ndim as u64]).for_each(|number| put(&mut bytes, number));
    }
    header.patterns.iter().for_each(|pattern| put(&mut bytes, pattern.len() as u64));
    slabs().flat_map(|slab| &slab.shape).for_each(|size| put(&mut bytes, *size));
    for table in &header.tables {
        bytes.extend(&table.attribute);
        bytes.extend(table.slab.iter().flat_map(|slab| &slab.tensor));
    }
    header.patterns.iter().for_each(|pattern| bytes.extend(pattern));
    pad(&mut bytes);
    Ok(bytes)
}

impl Encoder {
    /// Begins with a header and the ids of so many names; `None` where the n-th name has row n of table 0.
    ///
    /// `text` is how many bytes the names will have, about.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(
        header: &Header,
        names: usize,
        ids: Option<impl ExactSizeIterator<Item = u64>>,
        text: usize,
    ) -> Result<Self> {
        let listed = ids.as_ref().map_or(0, ExactSizeIterator::len);
        let mut bytes = encode_head(header, names, listed)?;
        memory::reserve(&mut bytes, 8 * listed + 4 * names + 8 + text)?;
        if let Some(ids) = ids {
            ids.for_each(|id| put(&mut bytes, id));
        }
        let length = bytes.len();
        let lengths_end = length + 4 * names;
        bytes.resize(lengths_end.next_multiple_of(8), 0);
        Ok(Self { bytes, length, lengths_end })
    }

    /// Adds the next name.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if it has 4 GB or more, or there are more names than were announced; [`Error::Memory`].
    pub fn push(&mut self, name: &[u8]) -> Result<()> {
        let length = u32::try_from(name.len()).map_err(|_| Error::TooLarge)?;
        let end = self.length + 4;
        if end > self.lengths_end {
            return Err(Error::TooLarge);
        }
        self.bytes.try_reserve(name.len()).map_err(|_| Error::Memory)?;
        self.bytes[self.length..end].copy_from_slice(&length.to_le_bytes());
        self.length = end;
        append(&mut self.bytes, name);
        Ok(())
    }

    /// All bytes.
    ///
    /// # Panics
    ///
    /// If there are fewer names than were announced.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        assert_eq!(self.length, self.lengths_end, "fewer names than were announced");
        self.bytes
    }
}

/// Tells whether bytes are what an [`Encoder`] would write, without writing it.
#[derive(Debug)]
pub struct Comparison<'a> {
    /// Of the names to come.
    lengths: &'a [u8],
    text: &'a [u8],
}

impl<'a> Comparison<'a> {
    /// Begins as [`Encoder::new`] does; `None` if the bytes have another header, other ids, or other names for sure.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(
        data: &'a [u8],
        header: &Header,
        names: usize,
        ids: Option<impl ExactSizeIterator<Item = u64>>,
    ) -> Result<Option<Self>> {
        let head = encode_head(header, names, ids.as_ref().map_or(0, ExactSizeIterator::len))?;
        Ok(Self::behind(data, &head, names, ids))
    }

    fn behind(
        data: &'a [u8],
        head: &[u8],
        names: usize,
        ids: Option<impl ExactSizeIterator<Item = u64>>,
    ) -> Option<Self> {
        let listed = ids.as_ref().map_or(0, ExactSizeIterator::len);
        let rest = data.strip_prefix(head)?;
        let (theirs, rest) = rest.split_at_checked(8 * listed)?;
        if !ids.into_iter().flatten().eq(numbers(theirs)) {
            return None;
        }
        let (lengths, rest) = rest.split_at_checked(4 * names)?;
        let text = rest.strip_prefix(&[0; 4][..4 * (names % 2)])?;
        Some(Self { lengths, text })
    }

    /// Whether this is the next name.
    pub fn matches(&mut self, name: &[u8]) -> bool {
        let next = self.lengths.split_first_chunk().zip(self.text.split_at_checked(name.len()));
        let Some(((length, lengths), (theirs, text))) = next else {
            return false;
        };
        (self.lengths, self.text) = (lengths, text);
        u32::from_le_bytes(*length) as usize == name.len() && is_same(theirs, name)
    }

    /// Whether there are no more names.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.lengths.is_empty() && self.text.is_empty()
    }
}

/// Appends a name. Most are short: two overlapping words are copied in less time than it takes to call `memcpy`.
fn append(bytes: &mut Vec<u8>, name: &[u8]) {
    match name.len() {
        8..=16 => append_ends::<8>(bytes, name),
        17..=32 => append_ends::<16>(bytes, name),
        _ => bytes.extend_from_slice(name),
    }
}

/// Appends a name of `N` to `2 * N` bytes: its first `N`, and, over them, its last.
fn append_ends<const N: usize>(bytes: &mut Vec<u8>, name: &[u8]) {
    if let (Some(first), Some(last)) = (name.first_chunk::<N>(), name.last_chunk::<N>()) {
        bytes.extend_from_slice(first);
        bytes.truncate(bytes.len() + name.len() - 2 * N);
        bytes.extend_from_slice(last);
    }
}

/// Whether two names of as many bytes are equal, as [`append`] copies them.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    match one.len() {
        8..=16 => one.first_chunk::<8>() == other.first_chunk() && one.last_chunk::<8>() == other.last_chunk(),
        17..=32 => one.first_chunk::<16>() == other.first_chunk() && one.last_chunk::<16>() == other.last_chunk(),
        _ => one == other,
    }
}

fn put(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend(number.to_le_bytes());
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// Reads what [`Encoder`] wrote. **O(n)**.
///
/// Everything is checked but whether a name is listed twice, which costs more than all the rest, and whoever makes an
/// index of the names finds out anyway; see [`Names::repeated`].
///
/// # Errors
///
/// [`Error::Damaged`] if the bytes are anything else; [`Error::Memory`].
pub fn decode(data: &[u8]) -> Result<(Header, Names<'_>)> {
    let mut reader = Reader { data, at: 0 };
    if reader.take(8)? != MAGIC {
        return Err(damaged(0, Damage::Magic));
    }
    let mut counts = [0; 6];
    for count in &mut counts {
        *count = reader.number()?;
    }
    let [names, ids, tables, patterns, dims, labels] = counts;
    if ids != 0 && ids != names {
        return Err(damaged(16, Damage::Ids));
    }
    let records = reader.many(tables, RECORD)?;
    let pattern_sizes = reader.many(patterns, 8)?;
    let mut dims = numbers(reader.many(dims, 8)?);
    let mut labels = Reader { at: reader.at, data: &data[..reader.at + reader.many(labels, 1)?.len()] };
    reader.padding()?;
    let mut header = Header {
        tables: memory::with_capacity(records.len() / RECORD)?,
        patterns: memory::with_capacity(pattern_sizes.len() / 8)?,
    };
    for (number, record) in records.chunks_exact(RECORD).enumerate() {
        header.tables.push(decode_table(record, 56 + number * RECORD, &mut labels, &mut dims)?);
    }
    for size in numbers(pattern_sizes) {
        header.patterns.push(labels.text(size)?);
    }
    if dims.next().is_some() || labels.at < labels.data.len() {
        return Err(damaged(labels.at, Damage::Header));
    }
    let used: Vec<u64> = memory::collect(header.tables.iter().map(|table| table.used))?;
    let names = Names::parse(reader, names, ids != 0, &used)?;
    Ok((header, names))
}

fn decode_table(
    record: &[u8],
    at: usize,
    labels: &mut Reader<'_>,
    dims: &mut impl Iterator<Item = u64>,
) -> Result<Table> {
    let mut fields = [0; 7];
    fields.iter_mut().zip(numbers(record)).for_each(|(field, number)| *field = number);
    let [attribute, group, flags, used, tensor, offset, ndim] = fields;
    if flags & !(TRAINABLE | IN_SLAB) != 0 || used > 1 << ROW_BITS {
        return Err(damaged(at, Damage::Header));
    }
    let attribute = labels.text(attribute)?;
    let slab = if flags & IN_SLAB == 0 {
        if (tensor, offset, ndim) != (0, 0, 0) {
            return Err(damaged(at, Damage::Header));
        }
        None
    } else {
        let tensor = labels.text(tensor)?;
        // There may be fewer than are announced, and `ndim` anything.
        let shape = memory::collect(dims.take(usize::try_from(ndim).unwrap_or(usize::MAX)))?;
        if shape.len() as u64 != ndim {
            return Err(damaged(at, Damage::Header));
        }
        let numel = shape.iter().try_fold(used, |product, size| product.checked_mul(*size));
        if numel.and_then(|numel| numel.checked_add(offset)).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(damaged(at, Damage::Header));
        }
        Some(Slab { tensor, offset, shape })
    };
    Ok(Table { attribute, group, trainable: flags & TRAINABLE != 0, used, slab })
}

/// Names and ids that have been checked, where they lie.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    len: usize,
    /// Eight bytes each, if they are listed.
    ids: Option<&'a [u8]>,
    /// Four bytes each.
    lengths: &'a [u8],
    text: &'a [u8],
}

impl<'a> Names<'a> {
    /// Reads and checks what follows the header; `used` is how many rows each table has given.
    fn parse(mut reader: Reader<'a>, names: u64, has_ids: bool, used: &[u64]) -> Result<Self> {
        let at = reader.at;
        let ids = if has_ids { Some((reader.at, reader.many(names, 8)?)) } else { None };
        let lengths_at = reader.at;
        let lengths = reader.many(names, 4)?;
        reader.padding()?;
        let text_at = reader.at;
        let text = reader.rest();
        let found = Self { len: lengths.len() / 4, ids: ids.map(|(_, ids)| ids), lengths, text };
        // No sum of so many 32-bit numbers overflows.
        let wanted: u64 = found.lengths().map(u64::from).sum();
        if wanted != text.len() as u64 {
            return Err(damaged(lengths_at, Damage::Lengths { wanted, got: text.len() as u64 }));
        }
        found.check_text(lengths_at, text_at)?;
        match ids {
            Some((ids_at, ids)) => check_ids(ids, ids_at, used)?,
            None if names > used.first().copied().unwrap_or(0) => return Err(damaged(at, Damage::NoRow)),
            None => {}
        }
        Ok(found)
    }

    fn check_text(&self, lengths_at: usize, text_at: usize) -> Result<()> {
        if let Some(empty) = self.lengths().position(|length| length == 0) {
            return Err(damaged(lengths_at + 4 * empty, Damage::Empty));
        }
        if self.text.is_ascii() {
            return Ok(());
        }
        let mut at = text_at;
        for (name, _) in self.iter() {
            if let Some(wrong) = invalid_at(name) {
                return Err(damaged(at + wrong, Damage::Text));
            }
            at += name.len();
        }
        Ok(())
    }

    /// How many there are. **O(1)**.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none. **O(1)**.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn lengths(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.lengths.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().expect("these are four")))
    }

    /// The names and their ids, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a [u8], u64)> + use<'a> {
        let mut text = self.text;
        let mut ids = self.ids.map(numbers);
        self.lengths().enumerate().map(move |(at, length)| {
            let (name, rest) = text.split_at(length as usize);
            text = rest;
            (name, ids.as_mut().and_then(Iterator::next).unwrap_or(at as u64))
        })
    }

    /// The place of the first name that stands further in front, too; `None` also where there is no memory to find out.
    /// **O(n)**.
    #[must_use]
    pub fn repeated(&self) -> Option<usize> {
        let mut words = Words::default();
        words.reserve(self.len).ok()?;
        let starts: Vec<&[u8]> = memory::collect(self.iter().map(|(name, _)| name)).ok()?;
        for (at, name) in starts.iter().enumerate() {
            let hash = Text(name).hash().max(1);
            match words.search(hash, |before| Text(starts[before as usize]).matches(&Text(name))) {
                Ok(_) => return Some(at),
                Err(slot) => words.fill(slot, hash, u32::try_from(at).ok()?),
            }
        }
        None
    }
}

/// A name as a key.
struct Text<'a>(&'a [u8]);

impl Hashed for Text<'_> {
    fn hash(&self) -> u32 {
        self.0.hash()
    }
}

impl Matches<Self> for Text<'_> {
    fn matches(&self, query: &Self) -> bool {
        self.0 == query.0
    }
}

/// Refuses ids that name a table or a row that is not there, or a row that another one names, too.
fn check_ids(ids: &[u8], at: usize, used: &[u64]) -> Result<()> {
    let mut first = memory::with_capacity(used.len())?;
    let mut rows = 0_u64;
    for count in used {
        first.push(rows);
        rows = rows.checked_add(*count).ok_or(damaged(at, Damage::NoRow))?;
    }
    // A bit a row, but not for the sake of rows that were given and taken back by the billion.
    let dense = rows / 64 <= (ids.len() / 8 + used.len()) as u64;
    let mut bits = memory::filled(0_u64, if dense { (rows / 64) as usize + 1 } else { 0 })?;
    let mut sorted = memory::with_capacity(if dense { 0 } else { ids.len() / 8 })?;
    for (number, id) in numbers(ids).enumerate() {
        let (table, row) = ((id >> ROW_BITS) as usize, id & ((1 << ROW_BITS) - 1));
        if used.get(table).is_none_or(|used| row >= *used) {
            return Err(damaged(at + 8 * number, Damage::NoRow));
        }
        let row = first[table] + row;
        if dense {
            let (word, bit) = (&mut bits[(row / 64) as usize], 1 << (row % 64));
            if *word & bit != 0 {
                return Err(damaged(at + 8 * number, Damage::SharedRow));
            }
            *word |= bit;
        } else {
            sorted.push((row, number));
        }
    }
    sorted.sort_unstable();
    match sorted.windows(2).filter(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1].1).min() {
        Some(number) => Err(damaged(at + 8 * number, Damage::SharedRow)),
        None => Ok(()),
    }
}

/// Appends a character in UTF-8, or a surrogate as if it were one.
pub fn push_character(character: u32, bytes: &mut Vec<u8>) {
    let tail = |shift: u32| 0x80 | (character >> shift & 0x3f) as u8;
    match character {
        0..0x80 => bytes.push(character as u8),
        0x80..0x800 => bytes.extend([0xc0 | (character >> 6) as u8, tail(0)]),
        0x800..0x1_0000 => bytes.extend([0xe0 | (character >> 12) as u8, tail(6), tail(0)]),
        _ => bytes.extend([0xf0 | (character >> 18) as u8, tail(12), tail(6), tail(0)]),
    }
}

/// Where a text stops to be UTF-8 in which surrogates may stand, too; `None` if it does not.
#[must_use]
pub fn invalid_at(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&text[at..]) {
            Ok(_) => return None,
            Err(error) => {
                at += error.valid_up_to();
                match text[at..] {
                    [0xed, 0xa0..=0xbf, 0x80..=0xbf, ..] => at += 3,
                    _ => return Some(at),
                }
            }
        }
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> + use<'_> {
    bytes.chunks_exact(8).map(|eight| u64::from_le_bytes(eight.try_into().expect("these are eight")))
}

fn damaged(at: usize, what: Damage) -> Error {
    Error::Damaged { at: at as u64, what }
}

/// Takes bytes from the front, and never more than there are.
struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(size).filter(|end| *end <= self.data.len());
        let Some(end) = end else {
            return Err(damaged(self.at, Damage::Ends { wanted: size as u64 }));
        };
        let taken = &self.data[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn many(&mut self, count: u64, size: usize) -> Result<&'a [u8]> {
        let bytes = count.checked_mul(size as u64).and_then(|bytes| usize::try_from(bytes).ok());
        self.take(bytes.unwrap_or(usize::MAX))
    }

    fn number(&mut self) -> Result<u64> {
        let at = self.at;
        numbers(self.take(8)?).next().ok_or(damaged(at, Damage::Ends { wanted: 8 }))
    }

    fn text(&mut self, size: u64) -> Result<Vec<u8>> {
        let at = self.at;
        let text = self.many(size, 1)?;
        match invalid_at(text) {
            None => memory::collect(text.iter().copied()),
            Some(wrong) => Err(damaged(at + wrong, Damage::Text)),
        }
    }

    fn padding(&mut self) -> Result<()> {
        let at = self.at;
        let padding = self.take(at.next_multiple_of(8) - at)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(damaged(at, Damage::Padding));
        }
        Ok(())
    }

    fn rest(&mut self) -> &'a [u8] {
        let rest = &self.data[self.at..];
        self.at = self.data.len();
        rest
    }
}
