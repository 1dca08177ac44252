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
    /// A slab would have more bytes than an `i64` can count.
    TooLarge,
    /// A slab cannot be cut into blocks of this size.
    BlockSize {
        /// The size that was asked for.
        got: u64,
        /// What it has to be a positive multiple of.
        multiple_of: u64,
    },
}

/// The result of an operation that may be refused.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { wanted, limit } => {
                write!(f, "an IndexMap holds at most {limit} names, and {wanted} were asked for")
            }
            Self::TooLarge => write!(f, "all tensors together have more than {} bytes", i64::MAX),
            Self::BlockSize { got, multiple_of } => {
                write!(f, "the size of a block must be a positive multiple of {multiple_of} bytes, got {got}")
            }
        }
    }
}

impl std::error::Error for Error {}
