//! Changes of a [`RowIndex`] that are planned first and then committed in one step.
//!
//! What can fail happens while a plan is made: names are looked up, places chosen, memory reserved. A plan belongs to the
//! index as it was then. After any other change it is refused.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::hash_table::MAX_ENTRIES;
use crate::memory;
use crate::names::table::{NameTable, New, Repeated};
use crate::names::text::Text;
use crate::rows::allocator::Rows;
use crate::rows::index::{RowIndex, certain, distinct, draw, tables_of};
use crate::rows::places::{Place, Places};

/// Why a plan cannot be made. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// There is no memory, or there are too many.
    Limit(Error),
    /// A name is not there.
    Missing {
        /// Its position in the list of names.
        at: usize,
    },
    /// A name is there already.
    Present,
    /// A name is listed twice.
    Repeated {
        /// The position at which it is listed once more.
        at: usize,
    },
    /// There are not as many places, or tables, as names.
    Lengths {
        /// The number of names.
        names: usize,
        /// The number of places.
        places: usize,
    },
    /// There are not as many numbers of rows as tables.
    Tables {
        /// The number of tables.
        tables: usize,
        /// The number of numbers.
        used: usize,
    },
    /// There is no table of this number.
    NoTable(i64),
    /// A place is missing, outside its table, or that of another name.
    Place {
        /// Its position.
        at: usize,
    },
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Limit(error)
    }
}

type Planned = std::result::Result<Plan, Refusal>;

/// A change that can be committed without failing.
pub struct Plan {
    /// The version of the index that it was made for.
    version: u64,
    places: Arc<Places>,
    new: NewRows,
    freed: Arc<Places>,
    change: Change,
}

enum Change {
    Committed,
    Insert { added: Added, moved: Vec<Moved>, taken: Vec<(usize, u64)> },
    Remove { positions: Vec<usize> },
    Clear { tables: Vec<Rows> },
    Replace { tables: Vec<Rows> },
    Rename { position: usize, name: Vec<u8> },
    MoveToEnd { position: usize, last: bool },
}

/// Which of the names that are listed get a new row.
enum NewRows {
    /// All of so many, which need no list.
    All(usize),
    /// Those at some positions, ascending.
    Some(Vec<usize>),
}

/// A name that is there and gets a row of another table.
struct Moved {
    /// Its position in the list of names.
    at: usize,
    /// Its position in the index.
    position: usize,
}

enum Added {
    /// All names of an index that has none yet.
    First(NameTable),
    More(New),
}

impl Plan {
    fn new(version: u64, change: Change) -> Self {
        let (places, freed) = (Arc::new(Places::default()), Arc::new(Places::default()));
        Self { version, places, new: NewRows::All(0), freed, change }
    }

    /// The place that each name will have: in the order in which they were listed, or, where none were, in theirs.
    #[must_use]
    pub fn places(&self) -> &Arc<Places> {
        &self.places
    }

    /// The positions, in the list of names to insert, of those that get a new row, ascending.
    #[must_use]
    pub fn new_rows(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        let (count, listed) = match &self.new {
            NewRows::All(count) => (*count, None),
            NewRows::Some(listed) => (listed.len(), Some(listed)),
        };
        (0..count).map(move |at| listed.map_or(at, |listed| listed[at]))
    }

    /// The positions, in the list of names to insert, of those that are added.
    fn added<'a>(&'a self, moved: &'a [Moved]) -> impl Iterator<Item = usize> + 'a {
        let mut moved = moved.iter().map(|moved| moved.at).peekable();
        self.new_rows().filter(move |at| moved.next_if_eq(at).is_none())
    }

    /// Keeps what belongs to those of the listed names that are added. No memory is needed.
    fn keep_added<T>(&self, listed: &mut Vec<T>, moved: &[Moved]) {
        if matches!(self.new, NewRows::All(_)) && moved.is_empty() {
            return;
        }
        let (mut at, mut added) = (0, self.added(moved).peekable());
        listed.retain(|_| {
            at += 1;
            added.next_if_eq(&(at - 1)).is_some()
        });
    }

    /// The rows that belong to a name before the commit, and to none afterwards; in the order of the names.
    #[must_use]
    pub fn freed(&self) -> &Arc<Places> {
        &self.freed
    }
}

/// Where the names to insert will lie, besides their places.
struct Choice {
    new: NewRows,
    /// The rows that names which are there lose.
    freed: Vec<Option<Place>>,
    moved: Vec<Moved>,
    /// How many rows each table gives.
    counts: Vec<u64>,
}

impl RowIndex {
    /// Plans that each of some distinct names lies in the table that is listed for it. **O(m)**.
    ///
    /// A name that lies there already keeps its row. Others get the next rows of their tables, in the order of the list.
    /// Names that are new go to the end, in order.
    ///
    /// # Errors
    ///
    /// [`Refusal::Repeated`], [`Refusal::Lengths`], [`Refusal::NoTable`], [`Error::Memory`], [`Error::Full`],
    /// [`Error::Rows`].
    pub fn plan_insert<Q: Text>(&mut self, mut names: Vec<Q>, tables: &[i64]) -> Planned {
        if names.len() != tables.len() {
            return Err(Refusal::Lengths { names: names.len(), places: tables.len() });
        }
        let is_table = |table: i64| usize::try_from(table).is_ok_and(|table| table < self.tables.len());
        if let Some(table) = tables.iter().find(|table| !is_table(**table)) {
            return Err(Refusal::NoTable(*table));
        }
        if names.len() > MAX_ENTRIES {
            return Err(Error::Full { wanted: names.len(), limit: MAX_ENTRIES }.into());
        }
        let is_first = self.names.is_empty();
        let (mut places, mut hashes) = (memory::with_capacity(names.len())?, Vec::new());
        if is_first {
            places.resize(names.len(), None);
        } else {
            memory::reserve(&mut hashes, names.len())?;
            self.names.find_many(&names, |_, hash, found| {
                places.push(found.map(|(_, place)| place));
                hashes.push(hash);
            });
        }
        if let Some(at) = first_shared(&places)? {
            return Err(Refusal::Repeated { at });
        }
        let Choice { new, freed, moved, counts } = self.choose(&names, &mut places, tables)?;
        let places = Arc::new(Places::from(places));
        let mut plan = Plan { version: self.version, places, new, freed: Arc::default(), change: Change::Committed };
        let added = if is_first {
            Added::First(distinct(names.into_iter().zip(plan.places.iter().map(certain)))?)
        } else {
            plan.keep_added(&mut names, &moved);
            plan.keep_added(&mut hashes, &moved);
            match self.names.plan_new(&names, &hashes)? {
                Ok(new) => Added::More(new),
                Err(Repeated(at)) => return Err(Refusal::Repeated { at: plan.added(&moved).nth(at).unwrap_or(at) }),
            }
        };
        self.reserve_free(&freed)?;
        let taken = memory::collect(counts.into_iter().enumerate().filter(|(_, count)| *count > 0))?;
        plan.freed = Arc::new(freed.into());
        plan.change = Change::Insert { added, moved, taken };
        Ok(plan)
    }

    /// Chooses a place in the table that is listed for each name; `places` are those that names have.
    fn choose<Q: Text>(&self, names: &[Q], places: &mut [Option<Place>], tables: &[i64]) -> Result<Choice> {
        let stays = |place: Option<Place>, table| place.is_some_and(|place| place.table() == table);
        let tables = || tables.iter().map(|table| table.cast_unsigned() as usize);
        let mut counts = memory::filled(0_u64, self.tables.len())?;
        let (mut count_new, mut count_moved) = (0, 0);
        for (place, table) in places.iter().zip(tables()).filter(|(place, table)| !stays(**place, *table)) {
            counts[table] += 1;
            count_new += 1;
            count_moved += usize::from(place.is_some());
        }
        let is_listed = count_new < names.len();
        let mut new = memory::with_capacity(if is_listed { count_new } else { 0 })?;
        let (mut freed, mut moved) = (memory::with_capacity(count_moved)?, memory::with_capacity(count_moved)?);
        let mut next = self.next_rows(&counts)?;
        for (at, (place, table)) in places.iter_mut().zip(tables()).enumerate() {
            if stays(*place, table) {
                continue;
            }
            if is_listed {
                new.push(at);
            }
            if place.is_some() {
                freed.push(*place);
                moved.extend(self.names.position_of(&names[at]).map(|position| Moved { at, position }));
            }
            *place = next[table].next().and_then(|row| Place::new(table, row));
        }
        drop(next);
        let new = if is_listed { NewRows::Some(new) } else { NewRows::All(names.len()) };
        Ok(Choice { new, freed, moved, counts })
    }

    /// Plans to remove some distinct names; the order of the others stays, and their rows become free. **O(m log m)**,
    /// or **O(m)** if their rows ascend.
    ///
    /// # Errors
    ///
    /// [`Refusal::Missing`], [`Refusal::Repeated`], [`Error::Memory`].
    pub fn plan_remove<Q: Text>(&mut self, names: &[Q]) -> Planned {
        let mut positions = memory::with_capacity(names.len())?;
        let mut freed = memory::with_capacity(names.len())?;
        let mut missing = None;
        if self.names.is_empty() {
            missing = (!names.is_empty()).then_some(0);
        } else {
            self.names.find_many(names, |at, _, found| match found {
                Some((position, place)) => {
                    positions.push(position);
                    freed.push(Some(place));
                }
                None => missing = missing.or(Some(at)),
            });
        }
        if let Some(at) = missing {
            return Err(Refusal::Missing { at });
        }
        if let Some(at) = first_shared(&freed)? {
            return Err(Refusal::Repeated { at });
        }
        self.reserve_free(&freed)?;
        let mut plan = Plan::new(self.version, Change::Remove { positions });
        plan.freed = Arc::new(freed.into());
        Ok(plan)
    }

    /// Plans to remove all names; the tables keep the number of rows that they have given. **O(n)**, and
    /// **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn plan_clear(&self) -> Result<Plan> {
        let freed = self.places()?;
        let mut tables = memory::with_capacity(self.tables.len())?;
        for rows in &self.tables {
            tables.push(Rows::all_free(rows.used())?);
        }
        let mut plan = Plan::new(self.version, Change::Clear { tables });
        plan.freed = Arc::new(freed);
        Ok(plan)
    }

    /// Plans other places for all names, in their order, and other numbers of rows that the tables have given.
    /// **O(n)**, and **O(used / 64)**.
    ///
    /// # Errors
    ///
    /// - [`Refusal::Lengths`] if there are not as many places as names.
    /// - [`Refusal::Tables`] if there are not as many numbers as tables.
    /// - [`Refusal::Place`] for a place that is missing, outside, or that of an earlier name.
    /// - [`Error::Memory`], [`Error::Rows`].
    pub fn plan_places(&self, places: Arc<Places>, used: &[u64]) -> Planned {
        if used.len() != self.tables.len() {
            return Err(Refusal::Tables { tables: self.tables.len(), used: used.len() });
        }
        if places.len() != self.names.len() {
            return Err(Refusal::Lengths { names: self.names.len(), places: places.len() });
        }
        let tables = tables_of(places.iter(), used)?;
        let is_free = |place: Place| tables[place.table()].is_free(place.row());
        let freed = memory::collect(
            self.names.iter().map(|(_, place)| Some(place)).filter(|place| place.is_some_and(is_free)),
        )?;
        let mut plan = Plan::new(self.version, Change::Replace { tables });
        (plan.places, plan.freed) = (places, Arc::new(freed.into()));
        Ok(plan)
    }

    /// Plans another name for an entry, which keeps its row and its place in the order. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Refusal::Missing`] if the old name is not there, [`Refusal::Present`] if the new one is; [`Error::Memory`].
    pub fn plan_rename(&mut self, old: &(impl Text + ?Sized), new: &(impl Text + ?Sized)) -> Planned {
        let Some(position) = self.names.position_of(old) else {
            return Err(Refusal::Missing { at: 0 });
        };
        if self.names.contains(new) {
            return Err(Refusal::Present);
        }
        let name = self.names.reserve_renamed(new)?;
        Ok(Plan::new(self.version, Change::Rename { position, name }))
    }

    /// Plans to move a name behind, or in front of, all others. **O(1)**.
    ///
    /// # Errors
    ///
    /// [`Refusal::Missing`], [`Error::Memory`].
    pub fn plan_move_to_end(&mut self, name: &(impl Text + ?Sized), last: bool) -> Planned {
        let Some(position) = self.names.position_of(name) else {
            return Err(Refusal::Missing { at: 0 });
        };
        self.names.reserve_moved(position, last)?;
        Ok(Plan::new(self.version, Change::MoveToEnd { position, last }))
    }

    /// Does what was planned. `false`, and nothing has changed, if the index has changed since the plan was made, or the
    /// plan is of another index. It needs no memory.
    ///
    /// **O(m)** for `m` names that are listed in the plan; **O(n)** if it is one for all.
    #[must_use]
    pub fn commit(&mut self, plan: &mut Plan) -> bool {
        if plan.version != self.version {
            return false;
        }
        self.version = draw();
        if plan.change.is_insertion() {
            self.inserts = draw();
        }
        if plan.change.is_move() || !plan.freed.is_empty() {
            self.moves = draw();
        }
        match std::mem::replace(&mut plan.change, Change::Committed) {
            Change::Committed => {}
            Change::Insert { added, moved, taken } => {
                for Moved { at, position } in &moved {
                    self.names.set_place_at(*position, certain(plan.places.get(*at).flatten()));
                }
                match added {
                    Added::First(map) => self.names.become_filled(map),
                    Added::More(new) => {
                        let places = plan.added(&moved).map(|at| certain(plan.places.get(at).flatten()));
                        self.names.append_new(new, places);
                    }
                }
                for (table, count) in taken {
                    self.tables[table].take(count);
                }
                self.free(&plan.freed);
            }
            Change::Remove { positions } => {
                self.names.remove_at(&positions);
                self.free(&plan.freed);
            }
            Change::Clear { tables } => {
                self.names.clear();
                self.tables = tables;
            }
            Change::Replace { tables } => {
                self.names.set_places(plan.places.iter().flatten());
                self.tables = tables;
            }
            Change::Rename { position, name } => self.names.rename_at(position, name),
            Change::MoveToEnd { position, last } => self.names.move_at(position, last),
        }
        true
    }

    /// For each table an iterator of its next rows, of which so many will be asked for.
    fn next_rows(&self, counts: &[u64]) -> Result<Vec<impl Iterator<Item = u64> + use<'_>>> {
        let mut next = memory::with_capacity(counts.len())?;
        for (rows, count) in self.tables.iter().zip(counts) {
            let used = rows.used() + (count - rows.reused(*count));
            if used > MAX_ENTRIES as u64 {
                return Err(Error::Rows { wanted: used, limit: MAX_ENTRIES as u64 });
            }
            next.push(rows.next(*count));
        }
        Ok(next)
    }

    /// Makes sure that rows can come back without memory for it.
    fn reserve_free(&mut self, freed: &[Option<Place>]) -> Result<()> {
        if freed.is_empty() {
            return Ok(());
        }
        let mut ends = memory::filled(0, self.tables.len())?;
        for place in freed.iter().flatten() {
            ends[place.table()] = ends[place.table()].max(place.row() + 1);
        }
        self.tables.iter_mut().zip(ends).try_for_each(|(rows, end)| rows.reserve_free_below(end))
    }

    fn free(&mut self, freed: &Places) {
        for place in freed.iter().flatten() {
            self.tables[place.table()].give_back(place.row());
        }
    }
}

impl Change {
    /// Whether it adds names, sets entries, or changes the order.
    fn is_insertion(&self) -> bool {
        matches!(self, Self::Insert { .. } | Self::Rename { .. } | Self::MoveToEnd { .. })
    }

    /// Whether it changes the rows of names that were there, besides those that are freed.
    fn is_move(&self) -> bool {
        matches!(self, Self::Replace { .. } | Self::Rename { .. })
    }
}

/// The first position of a place that stands before; `None` if all that are not missing are distinct.
///
/// **O(m)** where they ascend, otherwise **O(m log m)**.
fn first_shared(places: &[Option<Place>]) -> Result<Option<usize>> {
    let ids = || places.iter().enumerate().filter_map(|(at, place)| Some((place.as_ref()?.id(), at)));
    if ids().is_sorted_by(|one, other| one.0 < other.0) {
        return Ok(None);
    }
    let mut sorted = memory::collect(ids())?;
    sorted.sort_unstable();
    let repeated = sorted.windows(2).filter(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1].1);
    Ok(repeated.min())
}
