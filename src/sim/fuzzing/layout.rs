//! Where the structures of a cache device lie by rights, whatever the device itself says.

use crate::engine::{FormatPolicy, OpenOptions, SettingChange};
use crate::media::{Checksums, Geometry, KEYS_START_BYTES, SegmentInfo, Spot};
use crate::sim::image::ImagePmem;
use crate::sim::machine::Setup;
use crate::units::{Generation, SegId};

/// A place for a kset: segment, byte offset in it.
pub(super) type KsetPlace = (SegId, u32);

#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) checksums: Checksums,
}

/// Options that leave to the media what the cache is.
pub(super) fn open_options(setup: &Setup) -> OpenOptions {
    OpenOptions {
        data_crc: None,
        segment_size_bytes: None,
        settings: SettingChange::default(),
        ..setup.options(FormatPolicy::Never)
    }
}

impl Layout {
    pub(super) fn of(setup: &Setup) -> Self {
        let (device, segment) = (setup.device_size_bytes(), setup.segment_size_bytes);
        let geometry = Geometry::plan(device, segment, setup.block_size_bytes);
        Self {
            geometry: geometry.expect("a setup is possible"),
            checksums: Checksums::new(setup.options(FormatPolicy::Never).new_uuid),
        }
    }

    pub(super) fn segments(&self) -> impl Iterator<Item = SegId> + use<> {
        (0..self.geometry.segment_count()).map(SegId)
    }

    pub(super) fn info(&self, segment: SegId, copy: usize) -> Spot {
        Spot::segment_info(&self.geometry, &self.checksums, segment, copy)
    }

    /// The kset at a place, if the segment has an info.
    pub(super) fn kset(&self, image: &ImagePmem, (segment, off): KsetPlace) -> Option<Spot> {
        let (geometry, checksums) = (&self.geometry, &self.checksums);
        let info = SegmentInfo::load(image, geometry, checksums, segment).ok();
        let generation = info.map_or(Generation::NONE, |(info, _)| info.generation);
        Spot::kset(image, geometry, checksums, (segment, generation), off)
    }

    /// The places of all ksets, as far as they lie one behind the other; those of an earlier lap behind them
    /// included. Checksums do not matter.
    pub(super) fn kset_places(&self, image: &ImagePmem) -> Vec<KsetPlace> {
        let mut places = Vec::new();
        for segment in self.segments() {
            let mut off = KEYS_START_BYTES;
            while let Some(kset) = self.kset(image, (segment, off)) {
                places.push((segment, off));
                off += kset.size_bytes() as u32;
            }
        }
        places
    }

    /// Makes all checksums good: of every copy of everything, and of the ksets at `places`.
    pub(super) fn seal(&self, image: &ImagePmem, places: &[KsetPlace]) {
        for copy in 0..2 {
            Spot::superblock(copy).edit(image, |_| ());
            Spot::tails(&self.checksums, copy).edit(image, |_| ());
            for segment in self.segments() {
                self.info(segment, copy).edit(image, |_| ());
            }
        }
        let mut places = places.to_vec();
        places.sort_unstable();
        // One that reaches over the next must get its checksum last.
        for place in places.into_iter().rev() {
            if let Some(kset) = self.kset(image, place) {
                kset.edit(image, |_| ());
            }
        }
    }
}
