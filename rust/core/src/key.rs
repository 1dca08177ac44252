//! What a set without a hasher needs of its keys.

/// A key, or something a key can be looked up by, that knows its own hash.
///
/// Two values of which one [`Matches`] the other must have equal hashes. The hash is asked for once or twice in every
/// operation, so it should be cached or cheap, and spread well in its *low* bits.
pub trait Hashed {
    /// The hash of this value.
    fn hash(&self) -> u32;
}

/// A key that can be compared with a query of type `Q`.
pub trait Matches<Q: ?Sized>: Hashed {
    /// Whether this key is the one that `query` names.
    fn matches(&self, query: &Q) -> bool;
}
