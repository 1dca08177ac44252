//! What a map without a hasher needs of its keys.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

/// A key, or something a key can be looked up by, that knows its own hash.
///
/// Two values of which one [`Matches`] the other must have equal hashes. The hash is asked for once or twice in every
/// operation, so it should be cached or cheap, and spread well in its *low* bits.
pub trait Hashed {
    /// The hash of this value.
    fn hash(&self) -> u32;

    /// Begins to load the memory that to hash or compare this value will need, beyond that of the value itself.
    ///
    /// Bulk operations ask for it, so that cache misses overlap.
    fn prefetch(&self) {}

    /// Begins to load what lies at a place, a hint that this crate cannot give, for it has no unsafe code.
    fn prefetch_place<T>(_place: &T) {}
}

/// A key that can be compared with a query of type `Q`.
pub trait Matches<Q: ?Sized>: Hashed {
    /// Whether this key is the one that `query` names.
    fn matches(&self, query: &Q) -> bool;
}

/// Strings are hashed with the standard library's keyed hash, so that names from an untrusted file cannot be chosen to
/// collide. The key is drawn once in a process.
impl Hashed for str {
    fn hash(&self) -> u32 {
        self.as_bytes().hash()
    }
}

impl Hashed for [u8] {
    fn hash(&self) -> u32 {
        static STATE: OnceLock<RandomState> = OnceLock::new();
        let hash = STATE.get_or_init(RandomState::new).hash_one(self);
        (hash ^ (hash >> 32)) as u32
    }
}

impl Hashed for String {
    fn hash(&self) -> u32 {
        self.as_str().hash()
    }
}

impl Hashed for &str {
    fn hash(&self) -> u32 {
        (**self).hash()
    }
}

impl Matches<str> for String {
    fn matches(&self, query: &str) -> bool {
        self == query
    }
}

impl Matches<&str> for String {
    fn matches(&self, query: &&str) -> bool {
        self == query
    }
}

impl Matches<Self> for String {
    fn matches(&self, query: &Self) -> bool {
        self == query
    }
}
