//! The cache of rows and what a batch asks for, against maps and lists.
//!
//! The bugs that this hunts: a row of another name or another rank; a name that is sent twice, or not at all; rows that
//! were forgotten and come back; a cache that grows without a bound.

use std::collections::{BTreeMap, HashMap};

use pdrs_core::Error;
use pdrs_core::names::codec::hash;
use pdrs_core::names::known::{Asked, Counts, KnownRows, NO_ROW, Owners, Request};
use proptest::prelude::*;

/// What the owners have: the row of each name, or none.
fn row_of(name: &[u8]) -> u32 {
    if name[0].is_multiple_of(5) { NO_ROW } else { (hash(name) % 1000) as u32 }
}

fn owner_of(name: &[u8], (first, shards, _): (usize, usize, usize)) -> usize {
    first + (hash(name) % 4096 * shards as u64 / 4096) as usize
}

/// The rows and the names that a message asks one rank for, as another reads it.
fn asked_of(request: &Request, rank: usize) -> (Vec<i64>, Vec<Vec<u8>>) {
    let begin: usize = request.counts[..rank].iter().map(Counts::bytes).sum();
    let counts = &request.counts[rank..=rank];
    let message = &request.message[begin..begin + counts[0].bytes()];
    let asked = Asked::of(message, counts).expect("the lengths are right");
    let mut names = Vec::new();
    asked
        .names(|name| {
            names.push(name.to_vec());
            Ok::<_, Error>(())
        })
        .expect("the texts are right");
    let answer = asked.answer(&vec![-1; names.len()]).expect("there are as many rows");
    assert_eq!((answer.reply, answer.give), (vec![NO_ROW; names.len()], vec![answer.rows.len()]));
    (answer.rows, names)
}

#[derive(Debug, Clone)]
enum Step {
    Ask(Vec<Vec<u8>>),
    Forget(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let name = prop_oneof![
        prop::collection::vec(97_u8..103, 1..3),
        prop::collection::vec(97_u8..103, 8..20),
        prop::collection::vec(97_u8..99, 250..260),
    ];
    prop_oneof![
        8 => prop::collection::vec(name, 0..40).prop_map(Step::Ask),
        1 => (0_usize..6).prop_map(Step::Forget),
    ]
}

proptest! {
    #[test]
    fn each_name_gets_the_row_of_its_owner(
        steps in prop::collection::vec(step(), 1..12),
        limit in 2_usize..60,
        ranks in prop_oneof![Just((0, 1, 1)), Just((0, 4, 4)), Just((2, 3, 6))],
    ) {
        let owners = Owners::new(ranks.0, ranks.1, ranks.2).expect("there are such ranks");
        let mut known = KnownRows::new(limit);
        let mut told: HashMap<Vec<u8>, u32> = HashMap::new();
        for step in steps {
            let names = match step {
                Step::Ask(names) => names,
                Step::Forget(owner) => {
                    known.forget(owner);
                    told.retain(|name, _| owner_of(name, ranks) != owner);
                    continue;
                }
            };
            let texts: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
            let request = known.plan(&texts, owners).expect("there is memory").expect("no name is empty");
            let mut lists = BTreeMap::new();
            let mut rows_of_new = Vec::new();
            for rank in 0..ranks.2 {
                let (rows, new) = asked_of(&request, rank);
                let mut mine: Vec<Vec<u8>> = names.iter().filter(|name| owner_of(name, ranks) == rank).cloned().collect();
                mine.sort();
                mine.dedup();
                prop_assert_eq!(rows.len() + new.len(), mine.len(), "each name is sent once");
                prop_assert!(new.iter().all(|name| mine.contains(name)));
                for name in &new {
                    prop_assert_eq!(request.new_name(rows_of_new.len()), &name[..]);
                    rows_of_new.push(row_of(name));
                    told.remove(name);
                }
                // What is known was told, and was not forgotten.
                let mut expected: Vec<i64> =
                    mine.iter().filter(|name| !new.contains(name)).map(|name| i64::from(told[name])).collect();
                let mut got = rows.clone();
                expected.sort_unstable();
                got.sort_unstable();
                prop_assert_eq!(got, expected);
                let found = new.iter().map(|name| row_of(name)).filter(|row| *row != NO_ROW);
                let coming: Vec<i64> = rows.into_iter().chain(found.map(i64::from)).collect();
                lists.insert(rank, coming);
            }
            prop_assert_eq!(request.new_names(), rows_of_new.len());
            let placed = request.place(&rows_of_new).expect("there are as many rows");
            prop_assert_eq!(&placed.take, &lists.values().map(Vec::len).collect::<Vec<_>>());
            let come: Vec<i64> = lists.values().flatten().copied().collect();
            prop_assert_eq!(placed.places.len(), names.len());
            let begins: Vec<usize> =
                (0..ranks.2).map(|rank| placed.take[..rank].iter().sum()).collect();
            for (name, place) in names.iter().zip(&placed.places) {
                let expected = told.get(name).copied().unwrap_or_else(|| row_of(name));
                prop_assert_eq!(*place < 0, expected == NO_ROW);
                if *place >= 0 {
                    let (place, owner) = (usize::try_from(*place).expect("it is there"), owner_of(name, ranks));
                    prop_assert_eq!(come[place], i64::from(expected));
                    prop_assert!((begins[owner]..begins[owner] + placed.take[owner]).contains(&place));
                }
            }
            prop_assert_eq!(placed.has_absent, placed.places.contains(&-1));
            let ascending: Vec<i64> = (0..).take(come.len()).collect();
            prop_assert_eq!(placed.is_identity, placed.places == ascending);
            known.add(&request, &rows_of_new).expect("there is memory");
            known.check();
            prop_assert!(known.len() <= limit);
            for name in names.iter().filter(|name| row_of(name) != NO_ROW) {
                told.entry(name.clone()).or_insert_with(|| row_of(name));
            }
        }
    }
}

#[test]
fn the_last_names_are_known() {
    let owners = Owners::new(0, 2, 2).expect("there are such ranks");
    let mut known = KnownRows::new(8);
    for number in 0..40 {
        let names = [format!("n{number}"), "often".to_owned()];
        let request = known.plan(&names, owners).expect("there is memory").expect("no name is empty");
        assert_eq!(request.new_names(), if number == 0 { 2 } else { 1 });
        known.add(&request, &vec![number; request.new_names()]).expect("there is memory");
        known.check();
        assert!(known.len() <= 8);
        let again = known.plan(&names, owners).expect("there is memory").expect("no name is empty");
        assert_eq!(again.new_names(), 0);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let owners = Owners::new(0, 2, 2).expect("there are such ranks");
    let mut known = KnownRows::new(8);
    assert!(known.plan(&["a", ""], owners).expect("there is memory").is_none());
    let request = known.plan(&["a", "b"], owners).expect("there is memory").expect("no name is empty");
    let expected = Error::Length { expected: 2, got: 1 };
    assert_eq!(known.add(&request, &[1]), Err(expected.clone()));
    assert_eq!(request.place(&[1]), Err(expected));
    assert!(known.is_empty());
    let message = &request.message[..request.message.len() - 1];
    assert!(matches!(Asked::of(message, &request.counts), Err(Error::Length { .. })));
    let mut damaged = request.message.clone();
    damaged.fill(255);
    let asked = Asked::of(&damaged, &request.counts).expect("the length is right");
    assert!(matches!(asked.names(|_| Ok(())), Err(Error::Length { .. })));
    for (first, shards, ranks) in [(0, 0, 2), (1, 2, 2), (0, 4097, 5000), (usize::MAX, 1, 2)] {
        assert!(Owners::new(first, shards, ranks).is_none());
    }
}
