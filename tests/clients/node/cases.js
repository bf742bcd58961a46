// Cases for etcd3 of node, whose package comes without its tests. What each of them asserts is what etcd
// answers; the caller runs them against both servers.
//
//     node cases.js host:port,host:port,...
//
// prints one JSON object a case: {"name": ..., "why": null or what went wrong}.

'use strict';

const assert = require('node:assert/strict');
const { once } = require('node:events');
const { Etcd3, EtcdLeaseInvalidError, EtcdLockFailedError, EtcdUserNotFoundError, Range } = require('etcd3');

const hosts = process.argv[2].split(',');
const PATIENCE_MS = 30_000;

const cases = {
  async put_and_get(kv) {
    assert.equal(await kv.get('missing').string(), null);
    const { header } = await kv.put('key').value('one');
    assert.equal(await kv.get('key').string(), 'one');
    const previous = await kv.put('key').value('two').getPrevious();
    assert.equal(previous.value.toString(), 'one');
    assert.equal(previous.mod_revision, header.revision);
    assert.equal(await kv.get('key').revision(header.revision).string(), 'one');
    const [found] = (await kv.get('key').exec()).kvs;
    assert.equal(found.version, '2');
    assert.equal(found.create_revision, header.revision);
    assert.equal(BigInt(found.mod_revision) > BigInt(header.revision), true);
  },

  async values_of_any_bytes(kv) {
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, i) => i));
    await kv.put(bytes).value(bytes);
    assert.deepEqual(await kv.get(bytes).buffer(), bytes);
    const large = Buffer.alloc(1_000_000, 'x');
    await kv.put('large').value(large);
    assert.equal((await kv.get('large').buffer()).equals(large), true);
    await kv.put('empty').value('');
    assert.equal(await kv.get('empty').string(), '');
    assert.equal(await kv.get('empty').exists(), true);
  },

  async too_large_a_request_is_refused(kv) {
    await assert.rejects(kv.put('key').value(Buffer.alloc(2_000_000)).exec(), /request is too large/);
    assert.equal(await kv.get('key').exists(), false);
  },

  async ranges(kv) {
    for (const [key, value] of [['a', 3], ['b', 1], ['c', 2], ['cc', 0], ['d', 9]]) {
      await kv.put(key).value(value);
    }
    assert.deepEqual(await kv.getAll().prefix('c').numbers(), { c: 2, cc: 0 });
    assert.deepEqual(await kv.getAll().inRange({ start: 'b', end: 'cc' }).keys(), ['b', 'c']);
    assert.equal(await kv.getAll().count(), 5);
    assert.deepEqual(await kv.getAll().sort('Key', 'Descend').limit(2).keys(), ['d', 'cc']);
    assert.deepEqual(await kv.getAll().sort('Value', 'Ascend').keys(), ['cc', 'b', 'c', 'a', 'd']);
    const cut = await kv.getAll().limit(2).exec();
    assert.deepEqual([cut.count, cut.more, cut.kvs.length], ['5', true, 2]);
    const [b] = (await kv.get('b').exec()).kvs;
    assert.deepEqual(await kv.getAll().minModRevision(b.mod_revision).keys(), ['b', 'c', 'cc', 'd']);
    assert.deepEqual(await kv.getAll().maxCreateRevision(b.create_revision).keys(), ['a', 'b']);
    assert.equal(await kv.getAll().serializable(true).count() <= 5, true);
  },

  async deletes(kv) {
    for (const key of ['a', 'b', 'c', 'd']) {
      await kv.put(key).value(key);
    }
    const previous = await kv.delete().key('a').getPrevious();
    assert.deepEqual(previous.map((found) => found.value.toString()), ['a']);
    assert.equal((await kv.delete().key('a')).deleted, '0');
    assert.equal((await kv.delete().inRange({ start: 'b', end: 'd' })).deleted, '2');
    assert.deepEqual(await kv.getAll().keys(), ['d']);
    assert.equal((await kv.delete().all()).deleted, '1');
    assert.equal(await kv.getAll().count(), 0);
  },

  async transactions(kv) {
    await kv.put('key').value('one');
    const swap = (from, to) =>
      kv.if('key', 'Value', '==', from).and('key', 'Version', '>', 0)
        .then(kv.put('key').value(to), kv.get('key')).else(kv.get('key')).commit();
    const done = await swap('one', 'two');
    assert.equal(done.succeeded, true);
    assert.equal(done.responses[1].response_range.kvs[0].value.toString(), 'two');
    assert.equal(done.responses[1].response_range.kvs[0].mod_revision, done.header.revision);
    const not = await swap('one', 'three');
    assert.equal(not.succeeded, false);
    assert.equal(not.responses[0].response_range.kvs[0].value.toString(), 'two');
    assert.equal(not.header.revision, done.header.revision);
    const created = await kv.if('new', 'Create', '==', 0).then(kv.put('new').value(1)).commit();
    assert.equal(created.succeeded, true);
    const deleted = await kv.if('new', 'Mod', '!=', 0).then(kv.delete().all()).commit();
    assert.equal(deleted.responses[0].response_delete_range.deleted, '2');
    const twice = kv.if('key', 'Create', '==', 0).then(kv.put('key').value(1), kv.put('key').value(2));
    await assert.rejects(twice.commit(), /duplicate key given in txn request/);
  },

  async software_transactions(kv) {
    await kv.put('count').value(0);
    const add = () => kv.stm({ retries: 100 }).transact(async (tx) => {
      const count = await tx.get('count').number();
      await tx.put('count').value(count + 1);
    });
    await Promise.all(Array.from({ length: 8 }, add));
    assert.equal(await kv.get('count').number(), 8);
  },

  async compaction(kv, client) {
    const first = (await kv.put('key').value('one')).header.revision;
    const second = (await kv.put('key').value('two')).header.revision;
    await client.kv.compact({ revision: second, physical: true });
    const before = kv.get('key').revision(first).string();
    await assert.rejects(before, /required revision has been compacted/);
    assert.equal(await kv.get('key').revision(second).string(), 'two');
    const later = String(BigInt(second) + 1_000_000n);
    await assert.rejects(kv.get('key').revision(later).string(), /required revision is a future revision/);
    const again = client.kv.compact({ revision: first });
    await assert.rejects(again, /required revision has been compacted/);
  },

  async watch_from_now(kv) {
    const watcher = await kv.watch().key('key').withPreviousKV().create();
    const events = collect(watcher);
    await kv.put('other').value('x');
    await kv.put('key').value('one');
    await kv.put('key').value('two');
    await kv.delete().key('key');
    assert.deepEqual(await events(3), ['put one was null', 'put two was one', 'delete was two']);
    await watcher.cancel();
  },

  async watch_from_a_revision(kv) {
    const { header } = await kv.put('a').value('one');
    await kv.put('b').value('two');
    await kv.delete().key('a');
    const watcher = await kv.watch().prefix('').startRevision(header.revision).create();
    const events = collect(watcher);
    await kv.put('c').value('three');
    const seen = await events(4);
    assert.deepEqual(seen.map((event) => event.split(' was')[0]), ['put one', 'put two', 'delete', 'put three']);
    await watcher.cancel();
  },

  async watch_with_a_filter(kv) {
    const watcher = await kv.watch().prefix('').only('delete').create();
    const events = collect(watcher);
    await kv.put('a').value('one');
    await kv.delete().key('a');
    await kv.put('b').value('two');
    await kv.delete().key('b');
    const seen = await events(2);
    assert.deepEqual(seen.map((event) => event.split(' ')[0]), ['delete', 'delete']);
    await watcher.cancel();
  },

  async watchers_on_one_stream(kv) {
    const keys = Array.from({ length: 20 }, (_, i) => `key${i}`);
    const watchers = await Promise.all(keys.map((key) => kv.watch().key(key).create()));
    assert.equal(new Set(watchers.map((watcher) => watcher.id)).size, keys.length);
    const events = watchers.map(collect);
    await Promise.all(keys.map((key) => kv.put(key).value(key).exec()));
    for (const [i, key] of keys.entries()) {
      assert.deepEqual(await events[i](1), [`put ${key} was null`]);
    }
    await Promise.all(watchers.map((watcher) => watcher.cancel()));
  },

  async watch_of_what_is_compacted(kv, client) {
    const { header } = await kv.put('key').value('one');
    const last = (await kv.put('key').value('two')).header.revision;
    await client.kv.compact({ revision: last });
    const watcher = kv.watch().key('key').startRevision(header.revision).watcher();
    const [error] = await once(watcher, 'error');
    assert.match(error.message, /Watcher canceled/);
  },

  async leases(kv, client) {
    const lease = kv.lease(60, { autoKeepAlive: false });
    await lease.put('key').value('leased');
    const id = await lease.grant();
    const told = await client.leaseClient.leaseTimeToLive({ ID: id, keys: true });
    assert.equal(told.grantedTTL, '60');
    assert.equal(told.keys.length, 1);
    const kept = await lease.keepaliveOnce();
    assert.deepEqual([kept.ID, kept.TTL], [id, '60']);
    const { leases } = await client.leaseClient.leaseLeases();
    assert.equal(leases.some((listed) => listed.ID === id), true);
    await lease.revoke();
    assert.equal(await kv.get('key').exists(), false);
    await assert.rejects(kv.put('key').value('x').lease(id).exec(), EtcdLeaseInvalidError);
    const gone = await client.leaseClient.leaseTimeToLive({ ID: id });
    assert.equal(gone.TTL, '-1');
  },

  async lease_expires(kv) {
    const watcher = await kv.watch().key('key').create();
    const events = collect(watcher);
    const lease = kv.lease(1, { autoKeepAlive: false });
    await lease.put('key').value('leased');
    // The server tells of the end in its own time.
    assert.deepEqual(await events(2), ['put leased was null', 'delete was null']);
    await assert.rejects(lease.keepaliveOnce(), EtcdLeaseInvalidError);
    await watcher.cancel();
  },

  async lease_is_kept_alive(kv) {
    const lease = kv.lease(2);
    await lease.put('key').value('leased');
    let times = 0;
    await new Promise((resolve, reject) => {
      lease.on('lost', reject);
      lease.on('keepaliveSucceeded', () => (times += 1) >= 5 && resolve());
    });
    // Five answers take longer than the lease lasts without them.
    assert.equal(await kv.get('key').string(), 'leased');
    await lease.revoke();
  },

  async locks(kv) {
    const lock = await kv.lock('lock').ttl(30).acquire();
    await assert.rejects(kv.lock('lock').ttl(30).acquire(), EtcdLockFailedError);
    await lock.release();
    assert.equal(await kv.lock('lock').ttl(30).do(() => 'held'), 'held');
  },

  async elections(kv) {
    const election = kv.election('office', 30);
    const one = election.campaign('one');
    await one.wait();
    assert.equal(await election.leader(), 'one');
    const two = election.campaign('two');
    const elected = once(two, 'elected');
    await one.proclaim('still one');
    assert.equal(await election.leader(), 'still one');
    await one.resign();
    await elected;
    assert.equal(await election.leader(), 'two');
    await two.resign();
  },

  async status_and_members(kv, client) {
    const { members } = await client.cluster.memberList({});
    assert.equal(members.length, hosts.length);
    const names = members.map((member) => member.name).sort();
    assert.deepEqual(names, ['pifpaf0', 'pifpaf1', 'pifpaf2']);
    const status = await client.maintenance.status();
    assert.equal(members.some((member) => member.ID === status.leader), true);
    assert.match(status.version, /^3\.\d+\.\d+$/);
    assert.equal(Number(status.dbSize) > 0, true);
  },

  async alarms(kv, client) {
    const { members } = await client.cluster.memberList({});
    const memberID = members[0].ID;
    const full = { memberID, alarm: 'Nospace' };
    const alarm = (action, alarm = full) => client.maintenance.alarm({ ...alarm, action });
    try {
      assert.deepEqual((await alarm('Activate')).alarms, [full]);
      assert.deepEqual((await alarm('Get', { memberID: 0, alarm: 'None' })).alarms, [full]);
      await assert.rejects(kv.put('key').value('x').exec(), /database space exceeded/);
    } finally {
      await alarm('Deactivate');
    }
    assert.deepEqual((await alarm('Get', { memberID: 0, alarm: 'None' })).alarms, []);
    await kv.put('key').value('x');
  },

  async snapshot(kv, client) {
    await kv.put('key').value('x');
    const stream = await client.maintenance.snapshot();
    let bytes = 0;
    let remaining;
    stream.on('data', (part) => {
      bytes += part.blob.length;
      remaining = part.remaining_bytes;
    });
    await once(stream, 'end');
    assert.equal(remaining, '0');
    // Whole pages, and the checksum.
    assert.equal(bytes % 512, 32);
    assert.equal(bytes > 4096, true);
  },

  async users_and_roles(kv, client) {
    const role = await client.role('reader').create();
    await role.grant({ permission: 'Read', range: new Range(Buffer.from('a'), Buffer.from('b')) });
    const user = await client.user('reader').create('secret');
    await user.addRole(role);
    assert.deepEqual((await user.roles()).map((found) => found.name), ['reader']);
    await user.delete();
    await role.delete();
    await assert.rejects(client.user('reader').delete(), EtcdUserNotFoundError);
  },

  async authentication(kv, client) {
    // A connection that logs in, with keys in the namespace of this case.
    const opened = [];
    const as = (username, password) => {
      const other = new Etcd3({ hosts, auth: { username, password } });
      opened.push(other);
      return other;
    };
    const keys = (other) => other.namespace('authentication/');
    const rootRole = await client.role('root').create();
    const root = await client.user('root').create('root-secret');
    await root.addRole(rootRole);
    const role = await client.role('reader').create();
    const range = new Range(Buffer.from('authentication/a'), Buffer.from('authentication/b'));
    await role.grant({ permission: 'Read', range });
    const user = await client.user('reader').create('reader-secret');
    await user.addRole(role);
    await client.auth.authEnable();
    try {
      const admin = as('root', 'root-secret');
      await keys(admin).put('a').value('one');
      await keys(admin).put('secret').value('two');
      const reader = keys(as('reader', 'reader-secret'));
      assert.equal(await reader.get('a').string(), 'one');
      await assert.rejects(reader.get('secret').string(), /permission denied/);
      await assert.rejects(reader.put('a').value('x').exec(), /permission denied/);
      await assert.rejects(reader.getAll().keys(), /permission denied/);
      const watcher = await reader.watch().key('a').create();
      const events = collect(watcher);
      await keys(admin).put('a').value('three');
      assert.deepEqual(await events(1), ['put three was null']);
      await watcher.cancel();
      await assert.rejects(kv.get('a').string(), /user name is empty/);
      await assert.rejects(keys(as('reader', 'wrong')).get('a').string(), /authentication failed/);
      await assert.rejects(keys(as('nobody', 'x')).get('a').string(), /authentication failed/);
      // The library logs in anew when its token is no good any more.
      await admin.user('reader').setPassword('reader-secret');
      assert.equal(await reader.get('a').string(), 'three');
      const lock = await keys(admin).lock('lock').ttl(30).acquire();
      await lock.release();
    } finally {
      await as('root', 'root-secret').auth.authDisable();
      opened.forEach((other) => other.close());
    }
    await user.delete();
    await role.delete();
    await root.delete();
    await rootRole.delete();
    assert.equal(await kv.get('a').string(), 'three');
  },
};

// A function that answers so many events of `watcher`, once they are there; there may be no more.
function collect(watcher) {
  const seen = [];
  let changed = () => {};
  const add = (event) => {
    seen.push(event);
    changed();
  };
  const text = (found) => (found ? found.value.toString() : 'null');
  watcher.on('put', (found, previous) => add(`put ${text(found)} was ${text(previous)}`));
  watcher.on('delete', (found, previous) => add(`delete was ${text(previous)}`));
  return async (count) => {
    while (seen.length < count) {
      await new Promise((resolve) => (changed = resolve));
    }
    return seen;
  };
}

// What `work` comes to, or an error when patience is at its end.
async function within(work) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not done in ${PATIENCE_MS} ms`)), PATIENCE_MS);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

async function main() {
  const names = process.argv.slice(3);
  for (const [name, run] of Object.entries(cases)) {
    if (names.length > 0 && !names.includes(name)) {
      continue;
    }
    // A connection of its own, and keys of its own.
    const client = new Etcd3({ hosts });
    let why = null;
    try {
      await within(run(client.namespace(`${name}/`), client));
    } catch (error) {
      why = String(error?.stack ?? error);
    }
    client.close();
    console.log(JSON.stringify({ name, why }));
  }
}

main().then(
  // A case that has failed may have left something that would keep the process alive.
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
