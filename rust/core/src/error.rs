//! Every way this crate can refuse, and every message it says it with.

use std::fmt;

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A map was asked to hold more entries than its 32-bit ids can tell apart.
    Full {
        /// The number of entries that the map would have had to hold.
        wanted: usize,
        /// The largest number that it can hold.
        limit: usize,
    },
    /// An index cannot have more tables.
    Tables {
        /// The largest number that it can have.
        limit: usize,
    },
    /// A table cannot have given so many rows.
    Rows {
        /// The number of rows.
        wanted: u64,
        /// The largest number that can be given.
        limit: u64,
    },
    /// A name, or the text of all names, would be too long.
    Text {
        /// The bytes of the name.
        bytes: u64,
    },
    /// There is no memory for what was asked for.
    Memory,
    /// There is no such row.
    Row {
        /// The row.
        row: i64,
        /// How many rows there are.
        capacity: u64,
    },
    /// A list, or a message, has another length than what it belongs to.
    Length {
        /// How many there should be.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// A slab would have more bytes than an `i64` can count.
    TooLarge,
    /// A slab cannot be cut into blocks of this size.
    BlockSize {
        /// The size that was asked for.
        got: u64,
        /// What it has to be a positive multiple of.
        multiple_of: u64,
    },
    /// Packed names are not what they claim to be.
    Damaged {
        /// The byte at which that shows.
        at: u64,
        /// What is wrong.
        what: Damage,
    },
}

/// What is wrong with packed names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// They do not begin as they must.
    Magic,
    /// They end before something that they announce.
    Ends {
        /// The bytes that should have followed.
        wanted: u64,
    },
    /// There are more or fewer ids than names.
    Ids,
    /// What is told of a table contradicts itself.
    Header,
    /// A text is not UTF-8.
    Text,
    /// A name is empty.
    Empty,
    /// A name ends before it begins, or behind the text.
    Order,
    /// The table of words has another size than the names ask for, or something follows it.
    Words,
    /// A name has a row that no table has given.
    NoRow,
    /// A name has the row of another.
    SharedRow,
    /// What should be zero is not.
    Padding,
    /// A place among names does not lie behind the one before it, or there is no such name.
    Place,
}

/// The result of an operation that may be refused.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { wanted, limit } => {
                write!(f, "an IndexMap holds at most {limit} names, and {wanted} were asked for")
            }
            Self::Tables { limit } => write!(f, "an index has at most {limit} tables"),
            Self::Rows { wanted, limit } => write!(f, "a table has at most {limit} rows, and {wanted} were asked for"),
            Self::Text { bytes } => write!(
                f,
                "a name has less than 256 MiB, all names of a dictionary at most 32 GiB with what belongs to them, and \
                 {bytes} bytes more are too much"
            ),
            Self::Row { row, capacity } => write!(f, "row {row} is listed, and there are {capacity} rows"),
            Self::Memory => write!(f, "out of memory"),
            Self::Length { expected, got } => write!(f, "expected a length of {expected}, got {got}"),
            Self::TooLarge => write!(f, "all tensors together have more than {} bytes", i64::MAX),
            Self::BlockSize { got, multiple_of } => {
                write!(f, "the size of a block must be a positive multiple of {multiple_of} bytes, got {got}")
            }
            Self::Damaged { at, what } => write!(f, "the packed names are damaged at byte {at}: {what}"),
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => write!(f, "they do not begin with \"pdrs\" and a version that is known"),
            Self::Ends { wanted } => write!(f, "they end where {wanted} bytes more should follow"),
            Self::Ids => write!(f, "there are not as many ids as names"),
            Self::Header => write!(f, "what is told of a table cannot be"),
            Self::Text => write!(f, "a text is not UTF-8"),
            Self::Empty => write!(f, "a name is empty"),
            Self::Order => write!(f, "a name ends before it begins, or behind the text"),
            Self::Words => write!(f, "the names and the table of their words have another size than they should"),
            Self::NoRow => write!(f, "a name lies in a table or a row that is not there"),
            Self::SharedRow => write!(f, "two names have one row"),
            Self::Place => write!(f, "a place does not lie behind the one before, or is that of no name"),
            Self::Padding => write!(f, "what should be zero is not"),
        }
    }
}

impl std::error::Error for Error {}
