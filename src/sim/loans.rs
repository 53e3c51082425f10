//! Lent reads of a simulated machine: what was lent stays as it is until it is given back, whatever is
//! written, reclaimed and reused meanwhile.

use super::model::Violation;
use crate::engine::{Channel, LoanId};
use crate::pmem::{MemSlice, Pmem};

/// A loan of one core.
#[derive(Debug)]
pub(super) struct Held {
    id: LoanId,
    slice: MemSlice,
    /// What was there at first.
    bytes: Vec<u8>,
    /// Turns of the core until it is given back.
    turns: u64,
}

impl Held {
    /// `None`: the channel does not know of it.
    pub(super) fn new<P: Pmem>(channel: &Channel<P>, id: LoanId, turns: u64) -> Option<Self> {
        let slice = channel.loan(id)?;
        let bytes = bytes_of(slice);
        Some(Self {
            id,
            slice,
            bytes,
            turns,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// `true`: it is time to give it back.
    pub(super) fn pass_turn(&mut self) -> bool {
        self.turns = self.turns.saturating_sub(1);
        self.turns == 0
    }

    pub(super) fn give_back<P: Pmem>(self, channel: &mut Channel<P>) -> Result<(), Violation> {
        let unchanged = bytes_of(self.slice) == self.bytes;
        channel.give_back(self.id);
        if unchanged {
            Ok(())
        } else {
            Err(Violation("lent data have changed".to_owned()))
        }
    }
}

fn bytes_of(slice: MemSlice) -> Vec<u8> {
    let mut bytes = vec![0; slice.len_bytes()];
    slice.copy_to(&mut bytes).expect("memory from the heap");
    bytes
}
