//! Changes of a [`NameTable`] that need no plan: each is made at once, or refused before anything has changed.

use super::{NameTable, TOGETHER, stored_hash};
use crate::error::Result;
use crate::memory;
use crate::names::record::{self, UNIT};
use crate::names::text::Text;
use crate::rows::Place;

/// How many names ahead one is prefetched, and how many at an end are.
const AHEAD: usize = 16;

impl NameTable {
    /// Gives a name the place that `choose` makes of the one that it has. A new name goes to the end. **O(1)**,
    /// amortised.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory), [`Error::Full`](crate::Error::Full), [`Error::Text`](crate::Error::Text);
    /// nothing has changed.
    pub fn set(&mut self, name: &(impl Text + ?Sized), choose: impl FnOnce(Option<Place>) -> Place) -> Result<()> {
        self.reserve_one(name)?;
        name.with_utf8(|text| self.set_hashed(stored_hash(text), text, choose));
        Ok(())
    }

    /// The same for many names: `choose` gets the number of each, too. **O(m)**.
    ///
    /// # Errors
    ///
    /// As of [`set`](Self::set), also if there could not be room were all of them new.
    pub fn set_many<Q: Text>(
        &mut self,
        names: &[Q],
        mut choose: impl FnMut(usize, Option<Place>) -> Place,
    ) -> Result<()> {
        let (mut bytes, mut hashes) = (0, memory::with_capacity(names.len())?);
        for (at, name) in names.iter().enumerate() {
            names.get(at + AHEAD).into_iter().for_each(Q::prefetch);
            bytes += name.with_utf8(|text| {
                hashes.push(stored_hash(text));
                record::units_for(text.len())
            })? * UNIT;
        }
        self.reserve_words(names.len())?;
        self.reserve_bytes(bytes)?;
        for begin in (0..names.len()).step_by(TOGETHER) {
            let batch = begin..names.len().min(begin + TOGETHER);
            names[batch.clone()].iter().for_each(Q::prefetch);
            self.words.touch(hashes[batch.clone()].iter().copied());
            for id in hashes[batch.clone()].iter().filter_map(|hash| self.words.first_id(*hash)) {
                self.records.get(self.byte(self.position(id))).into_iter().for_each(Q::prefetch_place);
            }
            for at in batch {
                names[at].with_utf8(|text| self.set_hashed(hashes[at], text, |old| choose(at, old)));
            }
        }
        Ok(())
    }

    /// There must be room for a new name.
    fn set_hashed(&mut self, hash: u32, text: &[u8], choose: impl FnOnce(Option<Place>) -> Place) {
        match self.search(hash, text) {
            Ok(slot) => {
                let position = self.position(self.words.id(slot));
                let place = choose(self.place_at(position));
                self.set_place_at(position, place);
            }
            Err(empty) => {
                let (id, place) = (self.id(self.positions()), choose(None));
                record::push(&mut self.records, Some(place), text);
                self.words.fill(empty, hash, id);
                self.len += 1;
                self.generation += 1;
            }
        }
    }

    /// Removes a name and gives the place that it had; the order of the others stays. **O(1)**, amortised.
    pub fn remove(&mut self, name: &(impl Text + ?Sized)) -> Option<Place> {
        name.with_utf8(|text| {
            let hash = stored_hash(text);
            let position = self.find(hash, text)?;
            self.take_at(position, hash)
        })
    }

    /// Removes the last or the first name and gives the place that it had. **O(1)**, amortised.
    pub fn remove_end(&mut self, last: bool) -> Option<Place> {
        if self.len.is_multiple_of(AHEAD) {
            self.touch_end(last);
        }
        let end = if last { self.last() } else { self.first() }?;
        let (position, hash) = (end.position, stored_hash(end.name));
        self.take_at(position, hash)
    }

    /// Who removes one name often removes its neighbours next: their words can be fetched together.
    fn touch_end(&self, last: bool) {
        let (mut hashes, mut position) = ([0; AHEAD], if last { self.positions() } else { 0 });
        for hash in &mut hashes {
            let Some(entry) = (if last { self.previous(position) } else { self.next(position) }) else { break };
            (*hash, position) = (stored_hash(entry.name), entry.next);
        }
        self.words.touch(hashes.into_iter());
    }

    fn take_at(&mut self, position: usize, hash: u32) -> Option<Place> {
        let place = self.place_at(position);
        self.take(position, hash);
        self.tidy();
        place
    }

    /// Moves a name behind or in front of all others; whether it is there. **O(1)**, amortised.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory), [`Error::Text`](crate::Error::Text); nothing has changed.
    pub fn move_to_end(&mut self, name: &(impl Text + ?Sized), last: bool) -> Result<bool> {
        name.with_utf8(|text| {
            let hash = stored_hash(text);
            let Some(position) = self.find(hash, text) else { return Ok(false) };
            self.reserve_moved(position, last)?;
            self.move_hashed(position, hash, last);
            Ok(true)
        })
    }
}
