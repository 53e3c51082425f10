//! What a cache in use needs that grows with its device, beside the index: there before anything is stored to the device
//! (INV-OPEN-7).

use super::damage::Damage;
use super::heat::Heat;
use super::segments::SegmentsMemory;
use crate::gc::Gc;
use crate::media::Geometry;
use crate::memory::NoMemory;
use crate::writeback::Writeback;

/// See the module.
#[derive(Debug)]
pub(crate) struct CacheMemory {
    pub(crate) damage: Damage,
    pub(crate) heat: Heat,
    pub(crate) segments: SegmentsMemory,
    pub(crate) background: BackgroundMemory,
}

/// The background's part of it.
#[derive(Debug)]
pub(crate) struct BackgroundMemory {
    pub(super) writeback: Writeback,
    pub(super) gc: Gc,
}

impl CacheMemory {
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        Ok(Self {
            damage: Damage::new(geometry)?,
            heat: Heat::new(geometry)?,
            segments: SegmentsMemory::new(geometry)?,
            background: BackgroundMemory {
                writeback: Writeback::new(geometry)?,
                gc: Gc::new(geometry)?,
            },
        })
    }
}
