//! Where an actor runs, decided apart from what it is.
//!
//! Actors that send to each other need addresses before they exist: a [`Seat`] is an address with an
//! empty chair, so that no actor needs a link set after its construction.

use actix::dev::channel::{AddressReceiver, channel};
use actix::prelude::*;

/// An actor's address before the actor runs. What is sent to it waits in its mailbox.
pub struct Seat<A: Actor> {
    addr: Addr<A>,
    receiver: AddressReceiver<A>,
}

impl<A: Actor<Context = Context<A>>> Seat<A> {
    /// A seat whose mailbox holds `mailbox` messages for senders that respect the bound.
    pub fn new(mailbox: usize) -> Self {
        let (sender, receiver) = channel(mailbox);
        Seat { addr: Addr::new(sender), receiver }
    }

    /// The address.
    pub fn addr(&self) -> Addr<A> {
        self.addr.clone()
    }

    /// Starts the actor on `arbiter`, built there: an actor need not be `Send`, only its parts.
    pub fn start_in(self, arbiter: &ArbiterHandle, build: impl FnOnce() -> A + Send + 'static)
    where
        A: 'static,
    {
        let Seat { addr, receiver } = self;
        let started = arbiter.spawn_fn(move || {
            let actor = build();
            actix::spawn(Context::with_receiver(receiver).into_future(actor));
            drop(addr);
        });
        assert!(started, "an arbiter outlives its start-up");
    }
}

/// A thread of its own with a name that `top -H` shows.
pub fn arbiter(name: &'static str) -> Arbiter {
    let arbiter = Arbiter::new();
    arbiter.spawn_fn(move || {
        // Only a debugging aid: a kernel that refuses it changes nothing.
        let name = std::ffi::CString::new(name).expect("names have no zero byte");
        nix::sys::prctl::set_name(&name).ok();
    });
    arbiter
}
