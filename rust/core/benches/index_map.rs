//! What an operation costs, from 10^3 to 10^7 names: it must not grow but for cache misses.
//!
//! `cargo bench -p pdrs-core`; a part of it with `cargo bench -p pdrs-core -- pop/1000000`.
#![allow(missing_docs, reason = "criterion's macros write the functions")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pdrs_core::{Hashed, IndexMap, Matches};

/// A name of 16 characters with a cached hash, as a Python `str` has one.
#[derive(Clone)]
struct Name {
    hash: u32,
    text: [u8; 16],
}

impl Name {
    fn new(n: u64) -> Self {
        let mixed = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut text = [b'.'; 16];
        text[..8].copy_from_slice(&n.to_le_bytes());
        Self { hash: (mixed >> 32) as u32 ^ mixed as u32, text }
    }
}

impl Hashed for Name {
    fn hash(&self) -> u32 {
        self.hash
    }
}

impl Matches<Self> for Name {
    fn matches(&self, query: &Self) -> bool {
        self.text == query.text
    }
}

fn names(size: u64) -> Vec<Name> {
    (0..size).map(Name::new).collect()
}

/// The same names in a random order: a walk with a step that has no common divisor with the size.
fn shuffled(names: &[Name]) -> Vec<Name> {
    let size = names.len();
    let step = size * 618 / 1000;
    let step = (step..size).find(|step| gcd(*step, size) == 1).expect("there are primes");
    (0..size).map(|n| names[n * step % size].clone()).collect()
}

fn gcd(one: usize, other: usize) -> usize {
    if other == 0 { one } else { gcd(other, one % other) }
}

fn filled(names: &[Name]) -> IndexMap<Name, i64> {
    let mut map = IndexMap::new();
    let entries: Vec<_> = names.iter().cloned().zip(0..).collect();
    map.insert_many(entries, drop).expect("they fit");
    map
}

/// Times `each` over all names in a random order, in maps that are made anew whenever they are used up.
fn bench<R>(criterion: &mut Criterion, name: &str, mut each: impl FnMut(&mut IndexMap<Name, i64>, &Name) -> R) {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    for exponent in 3..=7 {
        let size = 10_u64.pow(exponent);
        let in_order = names(size);
        let queries = shuffled(&in_order);
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                let mut left = usize::try_from(rounds).expect("64 bits");
                while left > 0 {
                    let mut map = filled(&in_order);
                    let now = queries.len().min(left);
                    let start = Instant::now();
                    for query in &queries[..now] {
                        black_box(each(&mut map, query));
                    }
                    spent += start.elapsed();
                    left -= now;
                }
                spent
            });
        });
    }
    group.finish();
}

fn operations(criterion: &mut Criterion) {
    bench(criterion, "get", |map, name| map.get(name).copied());
    bench(criterion, "replace", |map, name| map.insert(name.clone(), 1));
    bench(criterion, "pop", IndexMap::remove);
    bench(criterion, "popitem_last", |map, _| map.pop_last());
    bench(criterion, "popitem_first", |map, _| map.pop_first());
    bench(criterion, "move_to_last", IndexMap::move_to_last);
    bench(criterion, "move_to_first", IndexMap::move_to_first);
}

criterion_group!(benches, operations);
criterion_main!(benches);
