//! What is forgotten while somebody writes.

use super::*;

/// A segment dies. At some moment of that one block of the page that lies there is written.
#[test]
fn what_is_left_of_a_page_that_is_written_meanwhile_is_forgotten_too() {
    let is_dead = |Place(place): Place| place < 64;
    for sweeps in [false, true] {
        for moment in 0..8 {
            let index = Rc::new(index(512));
            let at = index.locate(Page(0));
            set(&index, 0, 0, 8, Target::Mapped(Place(8)));
            let (points, writer) = (Cell::new(0), Rc::clone(&index));
            let write_if_free = move || {
                points.set(points.get() + 1);
                let at = writer.locate(Page(0));
                // Nobody else is at the page while somebody holds its bucket.
                let is_free = writer.claim(at, OTHER) == Claim::Taken;
                if is_free {
                    writer.release(at.bucket(), OTHER, Change::Moved);
                }
                if is_free && points.get() == moment {
                    set(&writer, 0, 3, 1, Target::Mapped(Place(1000)));
                }
            };
            let hook = move || sched::with_hook(None, &write_if_free);
            sched::with_hook(Some(Rc::new(hook)), || {
                let evict = || {
                    if sweeps {
                        (0..index.bucket_count()).all(|it| index.sweep_bucket(it, OTHER, is_dead))
                    } else {
                        index.evict(at, OTHER, is_dead)
                    }
                };
                while !evict() {}
            });
            for number in 0..8 {
                let found = block(&index, 0, number);
                let is_left = matches!(found, BlockMap::Mapped(place) if is_dead(place));
                assert!(
                    !is_left,
                    "block {number} of a page written at point {moment}: {found:?}"
                );
            }
            index.check_at_rest();
        }
    }
}
