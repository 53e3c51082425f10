//! How a machine ends, and the next one begins: an orderly stop, the death of the process, a power cut.

use super::super::base::BaseImage;
use super::super::model::Violation;
use super::super::pmem::SimPmem;
use super::super::prng::{Prng, mix};
use super::super::recover;
use super::{Machine, Setup, lock};
use crate::engine::WritebackOrder;
use std::sync::Arc;

impl Machine {
    /// An orderly stop and start, with another number of cores if wanted. Sometimes a bit has flipped
    /// meanwhile in one of the two copies of some metadata.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn restart(self, dice: u64, change: impl FnOnce(&mut Setup)) -> Result<Self, Violation> {
        self.settle()?;
        self.stop()?;
        let mut image = self.shared.pmem.live_image();
        let mut prng = Prng::new(dice);
        if prng.percent(50) {
            super::super::script::damage_a_copy(&self.shared.setup, &mut image, &mut prng);
        }
        if prng.percent(20) {
            let setup = Setup {
                block_count: self.cache().block_count(),
                ..self.setup_after()
            };
            recover::offer_another_base(&setup, &image, &mut prng)?;
        }
        self.start_again(image, change, dice)
    }

    /// An orderly stop: the background ends what it has begun. Nothing may be asked of the machine any more.
    ///
    /// # Errors
    /// It does not end, or a promise was broken.
    pub fn stop(&self) -> Result<(), Violation> {
        lock(&self.shared.driver).background.stop();
        self.run_until("a stop", || {
            lock(&self.shared.driver).background.in_flight() == 0
        })?;
        self.cache().seal_streams();
        Ok(())
    }

    /// A crash; `image` is what the cache device holds afterwards, `base` what the base does.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn crash(
        self,
        mut image: Vec<u8>,
        base: &BaseImage,
        dice: u64,
        change: impl FnOnce(&mut Setup),
    ) -> Result<Self, Violation> {
        self.verdict()?;
        self.with_outside(|outside| outside.check_held_after_cut(base))?;
        let mut prng = Prng::new(mix(dice, 1));
        if prng.percent(25) {
            super::super::script::damage_a_copy(&self.shared.setup, &mut image, &mut prng);
        }
        // What is going to be found is found out on a copy first, and is the truth from then on: a crash
        // in the middle of the recovery below must not change it.
        let stamps = self.with_outside(|outside| {
            let setup = &self.setup_after();
            let copy = super::super::image::ImagePmem::new(image.clone());
            recover::judge(copy, setup, &outside.model, base).map(|(stamps, _)| stamps)
        })?;
        self.with_outside(|outside| {
            outside.model.restart(&stamps);
            outside.base.restart(base);
        });
        self.start_again(image, change, dice)
    }

    /// The death of the process: what it has stored is there, fenced or not.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn kill(self, dice: u64, change: impl FnOnce(&mut Setup)) -> Result<Self, Violation> {
        let image = self.shared.pmem.live_image();
        let base = self.with_outside(|outside| outside.base.kill_image(&mut Prng::new(dice)));
        self.crash(image, &base, dice, change)
    }

    /// A power cut: of what is not fenced any part may be lost.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn cut_power(self, dice: u64, change: impl FnOnce(&mut Setup)) -> Result<Self, Violation> {
        let mut prng = Prng::new(dice);
        let kept_percent = prng.pick(&[0, 10, 50, 90, 100]);
        let image = self.shared.pmem.crash_image(|_, choices| {
            if prng.percent(kept_percent) {
                1 + prng.index(choices - 1)
            } else {
                0
            }
        });
        let base = self.with_outside(|outside| outside.base.crash_image(&mut prng));
        self.crash(image, &base, dice, change)
    }

    /// What the next start has to do with. A size that was shown to anybody holds for good (INV-GROW-1).
    fn setup_after(&self) -> Setup {
        let mut setup = self.shared.setup.clone();
        if self.cache().block_count() == setup.block_count {
            setup.block_count_first = None;
        }
        setup
    }

    fn start_again(
        self,
        image: Vec<u8>,
        change: impl FnOnce(&mut Setup),
        dice: u64,
    ) -> Result<Self, Violation> {
        self.verdict()?;
        let shared = &self.shared;
        // Nothing of the dead machine is used any more; its device is kept until here because base
        // operations name its memory.
        shared.pmem.on_crash_point(None);
        let base = self.with_outside(|outside| outside.base.current_image());
        self.with_outside(|outside| {
            outside.base.restart(&base);
            // None is held by the next process.
            outside.checkpoint = None;
        });
        let mut setup = self.setup_after();
        change(&mut setup);
        if setup.order == WritebackOrder::Relaxed {
            self.with_outside(|outside| outside.relaxed = true);
        }
        let hash = mix(self.event_hash(), dice);
        let prng = Prng::new(hash);
        let outside = Arc::clone(&shared.outside);
        let observer = shared.observer.clone();
        let block_count = setup.block_count;
        Self::start(
            setup,
            block_count,
            SimPmem::from_image(image),
            outside,
            observer,
            prng,
            hash,
        )
    }
}
