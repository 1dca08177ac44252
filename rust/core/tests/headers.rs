//! Ranks that meet tell each other what they do, and get the data that is for them.
//!
//! The bugs that this hunts: data or numbers that go to another rank; a rank that does something else, has failed, or
//! sends later, and is taken for one that does not; lengths that do not fit.

use pdrs_core::Error;
use pdrs_core::headers::{BYTES, Call, Headers, Meeting, PAYLOAD, Payload, TOLD};

const CALL: Call = [1 << 40, -7, 9];

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap()
}

/// What ranks say, and what each sends to each.
struct Told {
    call: Call,
    status: (i64, bool),
    data: Option<Vec<Vec<u8>>>,
}

fn same(ranks: usize) -> Vec<Told> {
    let to = |from: usize| (0..ranks).map(|to| vec![(10 * from + to) as u8; from + 2 * to]).collect();
    (0..ranks).map(|from| Told { call: CALL, status: (number(from) + 5, false), data: Some(to(from)) }).collect()
}

/// Lets all ranks meet, with windows of so many bytes; returns the windows, what each was told, and what it found.
fn meet(told: &[Told], room: usize) -> Vec<(Vec<u8>, Vec<i64>, Meeting)> {
    let ranks = told.len();
    let mut windows = vec![vec![0xAA; (ranks - 1) * room]; ranks];
    let mut rows = Vec::new();
    for (rank, one) in told.iter().enumerate() {
        let give: Vec<usize> = (0..ranks).map(|to| one.data.as_ref().map_or(0, |data| data[to].len())).collect();
        let data = one.data.as_ref().map(|data| data.concat());
        let headers = Headers { rank, ranks };
        let payload = Payload::ForAll([100, 200, -1, 300]);
        let sent = headers.message(one.call, one.status, &payload, data.as_deref(), Some(&give), room).unwrap();
        assert_eq!(sent.sizes[rank], 0);
        let mut at = 0;
        for (to, size) in sent.sizes.iter().enumerate().filter(|(to, _)| *to != rank) {
            let begin = room * (rank - usize::from(rank > to));
            windows[to][begin..begin + size].copy_from_slice(&sent.bytes[at..at + size]);
            at += size;
        }
        assert_eq!(at, sent.bytes.len());
        rows.push(sent.told);
    }
    let read = |(rank, (windows, mut row)): (usize, (Vec<u8>, Vec<i64>))| {
        let found = Headers { rank, ranks }.read(&windows, told[rank].call, &mut row).unwrap();
        (windows, row, found)
    };
    windows.into_iter().zip(rows).enumerate().map(read).collect()
}

#[test]
fn each_rank_gets_what_is_for_it() {
    for ranks in 1..5 {
        let told = same(ranks);
        for (rank, (windows, row, found)) in meet(&told, BYTES + 16).into_iter().enumerate() {
            assert_eq!(found, Meeting::Agreed(vec![]));
            let sizes: Vec<usize> = (0..ranks).map(|from| from + 2 * rank).collect();
            for (from, numbers) in row.chunks(TOLD).enumerate() {
                assert_eq!(numbers, [number(from) + 5, 100, 200, number(sizes[from]), 300]);
            }
            let data = told[rank].data.as_ref().unwrap();
            let headers = Headers { rank, ranks };
            let mut come = vec![0; sizes.iter().sum()];
            headers.receive(&windows, &data[rank], &sizes, &[], &[], &mut come).unwrap();
            let mut at_once = vec![0; come.len()];
            let mut again = vec![0; row.len()];
            let own = TOLD * rank..TOLD * (rank + 1);
            again[own.clone()].copy_from_slice(&row[own.clone()]);
            again[own.start] <<= 2;
            let mut read = |take: &[usize], told: &mut [i64]| {
                headers.read_and_receive(&windows, CALL, told, &data[rank], take, None, &mut at_once).unwrap()
            };
            let mut others = sizes.clone();
            others[0] += 1;
            assert_eq!(read(&others, &mut again.clone()), (Meeting::Agreed(vec![]), false));
            assert_eq!(read(&sizes, &mut again), (Meeting::Agreed(vec![]), true));
            assert_eq!((at_once, again), (come.clone(), row));
            let wanted: Vec<u8> = (0..ranks).flat_map(|from| vec![(10 * from + rank) as u8; sizes[from]]).collect();
            assert_eq!(come, wanted);
        }
    }
}

#[test]
fn a_rank_that_differs_is_noticed_by_all() {
    for at in 0..3 {
        let mut told = same(4);
        told[2].call[at] += 1;
        assert!(meet(&told, 128).iter().all(|(_, _, found)| *found == Meeting::Differs));
    }
}

#[test]
fn a_rank_that_has_failed_is_noticed_by_all_and_sends_nothing() {
    let mut told = same(3);
    told[1].status.1 = true;
    for (windows, row, found) in meet(&told, 128) {
        assert_eq!((found, row[TOLD]), (Meeting::Failed, 6));
        assert!(!windows.contains(&10) && !windows.contains(&12));
    }
}

#[test]
fn data_that_does_not_fit_comes_later() {
    let mut told = same(3);
    told[2].data.as_mut().unwrap()[0] = vec![20; 40];
    for (rank, (windows, _, found)) in meet(&told, BYTES + 39).into_iter().enumerate() {
        let later = vec![false, false, true];
        assert_eq!(found, Meeting::Agreed(later.clone()));
        let data = |from: usize| told[from].data.as_ref().unwrap()[rank].clone();
        let take: Vec<usize> = (0..3).map(|from| data(from).len()).collect();
        let headers = Headers { rank, ranks: 3 };
        let mut come = vec![0; take.iter().sum()];
        headers.receive(&windows, &data(rank), &take, &later, &data(2), &mut come).unwrap();
        assert_eq!(come, [data(0), data(1), data(2)].concat());
    }
    // What is for the rank itself needs no window.
    told = same(3);
    told[2].data.as_mut().unwrap()[2] = vec![22; 400];
    assert!(meet(&told, BYTES + 16).iter().all(|(_, _, found)| *found == Meeting::Agreed(vec![])));
}

#[test]
fn numbers_may_be_for_each_rank() {
    let numbers: Vec<i64> = (0..number(2 * PAYLOAD)).collect();
    let headers = Headers { rank: 1, ranks: 2 };
    let sent = headers.message(CALL, (0, false), &Payload::ForEach(&numbers), None, Some(&[3, 4]), 64).unwrap();
    assert_eq!((&sent.told[TOLD..], sent.bytes.len(), &sent.sizes[..]), (&[0, 4, 5, 6, 7][..], BYTES, &[BYTES, 0][..]));
    let words: Vec<i64> = sent.bytes.chunks(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap())).collect();
    assert_eq!(words, [CALL[0], CALL[1], CALL[2], 0, 0, 1, 2, 3]);
}

#[test]
fn numbers_for_all_ranks_stay_if_nothing_is_given() {
    let headers = Headers { rank: 0, ranks: 2 };
    let sent = headers.message(CALL, (3, false), &Payload::ForAll([1, 2, 3, 4]), None, None, 64).unwrap();
    assert_eq!((&sent.told[..TOLD], sent.bytes.len()), (&[12, 1, 2, 3, 4][..], BYTES));
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let headers = Headers { rank: 0, ranks: 2 };
    let all = Payload::ForAll([0; PAYLOAD]);
    let refused = |expected, got| Some(Error::Length { expected, got });
    assert_eq!(headers.message(CALL, (0, false), &all, None, Some(&[0]), 64).err(), refused(2, 1));
    assert_eq!(headers.message(CALL, (0, false), &all, Some(&[1]), Some(&[0, 2]), 64).err(), refused(2, 1));
    assert_eq!(headers.message(CALL, (0, false), &Payload::ForEach(&[0; 4]), None, None, 64).err(), refused(8, 4));
    assert_eq!(headers.read(&[0; 100], CALL, &mut [0; TOLD]).err(), refused(2 * TOLD, TOLD));
    assert_eq!(headers.read(&[0; 60], CALL, &mut [0; 2 * TOLD]).err(), refused(BYTES, 60));
    let received = |own: &[u8], take: &[usize], later: &[bool]| {
        headers.receive(&[0; 70], own, take, later, &[1], &mut vec![0; take.iter().sum()]).err()
    };
    assert_eq!(received(&[], &[0, 7], &[]), refused(BYTES + 7, 70));
    assert_eq!(received(&[1], &[2, 0], &[]), refused(2, 1));
    assert_eq!(received(&[], &[2, 0], &[true, false]), refused(2, 1));
    assert_eq!(received(&[], &[2], &[]), refused(2, 1));
    assert_eq!(headers.receive(&[0; 70], &[1], &[1, 0], &[], &[], &mut [0; 2]).err(), refused(1, 2));
    let sums = |rows: &[i64], give: &[usize], room| {
        headers.message_of_sums(CALL, [0; PAYLOAD], (1, rows, &[1.0_f32]), give, room).err()
    };
    assert_eq!(sums(&[0], &[4], 80), refused(2, 1));
    assert_eq!(sums(&[0, 0], &[4, 4], 80), refused(2, 1));
    assert_eq!(sums(&[0], &[4, 20], 80), refused(80, BYTES + 20));
    assert_eq!(sums(&[0], &[40, 16], 80), None);
    assert_eq!(sums(&[2], &[4, 4], 80), None);
    assert_eq!(sums(&[3], &[4, 4], 80), Some(Error::Row { row: 3, capacity: 2 }));
}

#[test]
fn sums_are_sent_as_the_same_bytes_would_be() {
    let (ranks, room) = (4, 200);
    let give = [8, 0, 16, 24];
    let rows = [5, 0, 6, 2, 5, 3];
    let given: Vec<f32> = (0..12u8).map(f32::from).collect();
    let sums = [2.0, 3.0, 0.0, 0.0, 6.0, 7.0, 10.0, 11.0, 0.0, 0.0, 8.0, 10.0_f32].map(f32::to_ne_bytes).concat();
    for rank in 0..ranks {
        let headers = Headers { rank, ranks };
        let payload = [7, 8, 0, 9];
        let (message, own) = headers.message_of_sums(CALL, payload, (2, &rows, &given), &give, room).unwrap();
        let all = Payload::ForAll(payload);
        let plain = headers.message(CALL, (0, false), &all, Some(&sums), Some(&give), room).unwrap();
        assert_eq!((message.bytes, message.sizes, message.told), (plain.bytes, plain.sizes, plain.told));
        let begin = give[..rank].iter().sum::<usize>();
        assert_eq!(own, sums[begin..begin + give[rank]]);
    }
}

#[test]
fn rows_come_where_they_are_wanted() {
    let told = same(3);
    for (rank, (windows, row, _)) in meet(&told, BYTES + 16).into_iter().enumerate() {
        let headers = Headers { rank, ranks: 3 };
        let own = &told[rank].data.as_ref().unwrap()[rank];
        let take: Vec<usize> = (0..3).map(|from| from + 2 * rank).collect();
        let mut all = vec![0; take.iter().sum()];
        headers.receive(&windows, own, &take, &[], &[], &mut all).unwrap();
        all.push(0);
        let rows: Vec<i64> = (0..number(all.len())).rev().chain([0]).collect();
        let wanted: Vec<u8> = rows.iter().map(|row| all[usize::try_from(*row).unwrap()]).collect();
        let mut placed = vec![7; rows.len()];
        let read = |rows: &[i64], placed: &mut [u8]| {
            let mut told = row.clone();
            told[TOLD * rank] <<= 2;
            headers.read_and_receive(&windows, CALL, &mut told, own, &take, Some((1, rows)), placed)
        };
        assert_eq!(read(&rows, &mut placed), Ok((Meeting::Agreed(vec![]), true)));
        assert_eq!(placed, wanted);
        let none = number(all.len());
        assert_eq!(read(&[none], &mut [0]), Err(Error::Row { row: none, capacity: all.len() as u64 - 1 }));
    }
}
