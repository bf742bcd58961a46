//! Authorities that are none, as Go clients of etcd send them.
//!
//! A client of etcd 3.4 that is told to dial `http://127.0.0.1:2379` says just that in `:authority`,
//! one of 3.5 says `#initially=[http://127.0.0.1:2379]`. etcd serves both, since its gRPC server reads
//! no authority. The HTTP library parses it, and resets the stream before any code of ours sees the
//! request. So [`mend`] overwrites the value of such a field below the library; one that is an
//! authority is left as it is: who serves plain HTTP, or logs a request, may go by it.
//!
//! The new value is as long as the old one, both as encoded and as decoded. Because of the first, all
//! lengths around it stay true. Because of the second, the library's dynamic table, where an entry
//! weighs as much as its decoded text (RFC 7541 section 4.1), goes on evicting what the client's does,
//! so that indices mean the same to both; a later request that refers to the entry gets the new value.

use std::ops::Range;

use http::uri::Authority;

/// Flags of a HEADERS frame.
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// In the static table, with an empty value. Clients name the field by it: it comes before all
/// entries of their own.
const NAME_INDEX: usize = 1;
const NAME: &[u8] = b":authority";
const NAME_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// A prefix integer goes on for no more bytes than this, as in the HTTP library: 28 bits and the
/// prefix.
const INTEGER_BYTES_MAX: usize = 4;

/// Gives the `:authority` in a HEADERS frame's payload another value if it is no authority.
///
/// What is malformed otherwise is left to the HTTP library, and so is what a block goes on with in
/// CONTINUATION frames: an authority stands among the first fields.
pub(super) fn mend(flags: u8, payload: &mut [u8]) {
    let Some(Text { huffman, range }) = find(flags, payload) else { return };
    let value = &mut payload[range];
    if !huffman {
        if Authority::try_from(&*value).is_err() {
            value.fill(b'X');
        }
    } else if let Some(decoded) = decode(value)
        && Authority::try_from(&decoded[..]).is_err()
    {
        encode_filler(value, decoded.len());
    }
}

/// A string literal of a header block.
struct Text {
    huffman: bool,
    /// Of its bytes, in the frame's payload.
    range: Range<usize>,
}

/// The value of the first `:authority` that is a literal.
fn find(flags: u8, payload: &[u8]) -> Option<Text> {
    let (mut at, mut end) = (0, payload.len());
    if flags & PADDED != 0 {
        end = end.checked_sub(usize::from(*payload.first()?))?;
        at += 1;
    }
    if flags & PRIORITY != 0 {
        at += 5;
    }
    let mut block = Block { bytes: &payload[..end], at };
    loop {
        // RFC 7541 section 6: the representation is told by the first bit that is set.
        let name_bits = match block.bytes.get(block.at)?.leading_zeros() {
            // Indexed.
            0 => {
                block.integer(7)?;
                continue;
            }
            // With incremental indexing.
            1 => 6,
            // A size update of the dynamic table.
            2 => {
                block.integer(5)?;
                continue;
            }
            // Without indexing, or never indexed.
            _ => 4,
        };
        let named = match block.integer(name_bits)? {
            0 => {
                let Text { huffman, range } = block.text()?;
                &block.bytes[range] == if huffman { NAME_HUFFMAN } else { NAME }
            }
            index => index == NAME_INDEX,
        };
        let value = block.text()?;
        if named {
            return Some(value);
        }
    }
}

/// A header block, read up to `at`. Its methods answer `None` where it is cut off or an integer is too
/// long.
struct Block<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Block<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// RFC 7541 section 5.1; `bits` are the prefix's.
    fn integer(&mut self, bits: u32) -> Option<usize> {
        let prefix_max = (1 << bits) - 1;
        let prefix = usize::from(self.byte()?) & prefix_max;
        if prefix < prefix_max {
            return Some(prefix);
        }
        let mut value = prefix;
        for nth in 0..INTEGER_BYTES_MAX {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << (7 * nth);
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// RFC 7541 section 5.2.
    fn text(&mut self) -> Option<Text> {
        let huffman = self.bytes.get(self.at)? & 0x80 != 0;
        let length = self.integer(7)?;
        let range = self.at..self.at.checked_add(length)?;
        self.bytes.get(range.clone())?;
        self.at = range.end;
        Some(Text { huffman, range })
    }
}

/// The Huffman code of RFC 7541 appendix B, as far as printable text needs it: lengths in bits, and
/// which symbols have a code that long. Codes are numbered in this order, across lengths too. Left out
/// are `\` and what is not printable, with codes of 19 bits and more.
const CODES: [(u32, &[u8]); 10] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
];

/// The symbol whose code `window` begins with, and the code's length.
fn symbol(window: u16) -> Option<(u8, usize)> {
    let (mut first, mut length) = (0, 0);
    for (bits, symbols) in CODES {
        first <<= bits - length;
        length = bits;
        // Not below zero: a lesser prefix has a shorter code and was found before.
        let nth = usize::from(window >> (16 - bits)) - first;
        if let Some(&symbol) = symbols.get(nth) {
            return Some((symbol, bits as usize));
        }
        first += symbols.len();
    }
    None
}

/// The text that `bytes` encode; `None` if it is malformed or not all in [`CODES`].
fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
    let bits = 8 * bytes.len();
    let mut decoded = Vec::with_capacity(bits / 5);
    let mut at = 0;
    while at < bits {
        // Past the end stand the ones that padding is made of.
        let byte = |nth: usize| u32::from(*bytes.get(at / 8 + nth).unwrap_or(&0xff));
        let window = (byte(0) << 16 | byte(1) << 8 | byte(2)) >> (8 - at % 8);
        let Some((symbol, length)) = symbol(window as u16) else {
            let padding = bits - at < 8 && window as u16 == u16::MAX;
            return padding.then_some(decoded);
        };
        at += length;
        decoded.push(symbol);
    }
    // A code that goes on past the end is cut off.
    (at == bits).then_some(decoded)
}

/// Fills `value` with the Huffman code of some authority of `symbols` symbols, without padding.
///
/// That takes codes of five bits, the shortest, to eight. A text whose codes are longer on average is
/// left as it is: encoders send it plain, and no address is like that.
fn encode_filler(value: &mut [u8], symbols: usize) {
    let bits = 8 * value.len();
    if bits > 8 * symbols {
        return;
    }
    let (mut pending, mut pending_bits) = (0u16, 0);
    let mut bytes = value.iter_mut();
    for nth in 0..symbols {
        // As even as whole bits allow.
        let width = bits * (nth + 1) / symbols - bits * nth / symbols;
        let code = match width {
            5 => 0b0_0000,    // 0
            6 => 0b01_0110,   // -
            7 => 0b101_1101,  // B
            _ => 0b1111_1100, // X
        };
        pending = pending << width | code;
        pending_bits += width;
        if pending_bits >= 8 {
            pending_bits -= 8;
            let byte = bytes.next().expect("the codes are as long as the value");
            *byte = (pending >> pending_bits) as u8;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What etcd's clients send.
    const INVALID: [&str; 4] = [
        "http://127.0.0.1:2379",
        "#initially=[http://127.0.0.1:1]",
        "#initially=[https://etcd-0.example.com:2379;https://etcd-1.example.com:2379]",
        "unix:///run/etcd/client.sock",
    ];
    const VALID: [&str; 5] =
        ["localhost", "127.0.0.1:2379", "[::1]:2379", "user@etcd-0.example.com:2379", "unix"];

    fn huffman(text: &str) -> Vec<u8> {
        let mut bits = String::new();
        for wanted in text.bytes() {
            let (mut code, mut length) = (0, 0);
            for (width, symbols) in CODES {
                code <<= width - length;
                length = width;
                match symbols.iter().position(|&symbol| symbol == wanted) {
                    Some(nth) => {
                        bits += &format!("{:0width$b}", code + nth, width = width as usize);
                        break;
                    }
                    None => code += symbols.len(),
                }
            }
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        let byte = |nth: usize| u8::from_str_radix(&bits[8 * nth..8 * nth + 8], 2);
        (0..bits.len() / 8).map(|nth| byte(nth).expect("binary digits")).collect()
    }

    fn integer(tag: u8, bits: u32, value: usize) -> Vec<u8> {
        let prefix_max = (1 << bits) - 1;
        if value < prefix_max {
            return vec![tag | value as u8];
        }
        let (mut bytes, mut rest) = (vec![tag | prefix_max as u8], value - prefix_max);
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
        bytes
    }

    fn text(text: &str, huffman: bool) -> Vec<u8> {
        let (tag, bytes) =
            if huffman { (0x80, self::huffman(text)) } else { (0, text.as_bytes().to_vec()) };
        let mut whole = integer(tag, 7, bytes.len());
        whole.extend(bytes);
        whole
    }

    /// A request's header block, with an `:authority` that enters the dynamic table.
    pub fn block(authority: &str, huffman: bool) -> Vec<u8> {
        let mut block = vec![0x83, 0x86];
        block.extend([&[0x44][..], &text("/etcdserverpb.KV/Range", huffman)].concat());
        block.extend([&[0x41][..], &text(authority, huffman)].concat());
        block.extend([&[0x40][..], &text("te", huffman), &text("trailers", huffman)].concat());
        block
    }

    fn mended(flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut mended = payload.to_vec();
        mend(flags, &mut mended);
        mended
    }

    /// The text of the `:authority` in a payload, its place, and whether it was Huffman's.
    fn authority(flags: u8, payload: &[u8]) -> (Vec<u8>, Range<usize>) {
        let Text { huffman, range } = find(flags, payload).expect("an authority");
        let bytes = &payload[range.clone()];
        (if huffman { decode(bytes).expect("well formed") } else { bytes.to_vec() }, range)
    }

    /// That only the value changed, into an authority of the same length in both forms.
    fn assert_mended(flags: u8, payload: &[u8]) {
        let mended = mended(flags, payload);
        let ((old, old_range), (new, range)) =
            (authority(flags, payload), authority(flags, &mended));
        assert_eq!(old_range, range);
        assert_eq!(old.len(), new.len());
        assert!(Authority::try_from(&old[..]).is_err(), "{old:?}");
        assert!(Authority::try_from(&new[..]).is_ok(), "{new:?}");
        assert_eq!(payload[..range.start], mended[..range.start]);
        assert_eq!(payload[range.end..], mended[range.end..]);
    }

    #[test]
    fn rfc_examples_decode() {
        let example = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(decode(&example).as_deref(), Some(&b"www.example.com"[..]));
        assert_eq!(huffman("www.example.com"), example);
        assert_eq!(huffman(":authority"), NAME_HUFFMAN);
        assert_eq!(decode(b"").as_deref(), Some(&b""[..]));
        for malformed in [&[0xff][..], &[0x07, 0xff], &[0x06], &[0xff, 0xff, 0xff, 0xff], &[0xfe]] {
            assert_eq!(decode(malformed), None, "{malformed:x?}");
        }
    }

    /// A symbol that may stand in an authority must not be taken for malformed.
    #[test]
    fn all_symbols_of_authorities_have_codes() {
        for symbol in 0..=u8::MAX {
            let has_code = CODES.iter().any(|(_, symbols)| symbols.contains(&symbol));
            let printable = (b' '..=b'~').contains(&symbol) && symbol != b'\\';
            assert_eq!(has_code, printable || symbol == 0, "{symbol}");
            if Authority::try_from(&[b'a', symbol, b'@', b'b'][..]).is_ok() {
                assert!(has_code, "{symbol}");
            }
        }
    }

    #[test]
    fn each_representation_is_read() {
        let names: [&[u8]; 4] = [&[0x41], &[0x01], &[0x11], &[0x40]];
        for (huffman, name) in [false, true].into_iter().flat_map(|h| names.map(|name| (h, name))) {
            for (value, is_valid) in
                INVALID.map(|value| (value, false)).into_iter().chain(VALID.map(|v| (v, true)))
            {
                // Size updates to 0 and to 4096, indexed fields of both tables, other literals of each
                // kind with names of both, of which one is long.
                let mut payload = vec![0x20, 0x3f, 0xe1, 0x1f, 0x83, 0xbe, 0xff, 0x80, 0x01];
                payload.extend([&[0x44][..], &text("/", huffman)].concat());
                payload.extend([&[0x0f, 0x70][..], &text("x", huffman)].concat());
                payload.extend([&[0x10][..], &text(&"n".repeat(300), huffman), &[0]].concat());
                payload.extend(name);
                if name == [0x40] {
                    payload.extend(text(":authority", huffman));
                }
                payload.extend(text(value, huffman));
                payload.extend([0x40, 0x01, b'n', 0x01, b'v']);
                assert_eq!(authority(0, &payload).0, value.as_bytes());
                if is_valid {
                    assert_eq!(mended(0, &payload), payload, "{value}");
                } else {
                    assert_mended(0, &payload);
                }
            }
        }
    }

    #[test]
    fn padding_and_priority_are_skipped() {
        for huffman in [false, true] {
            let block = block(INVALID[0], huffman);
            // Both contain what would be an authority.
            let (padding, priority) = ([0x41, 0x01, b'/'], [0x41, 0x02, b'/', b'/', 0]);
            assert_mended(PRIORITY, &[&priority[..], &block].concat());
            assert_mended(PADDED, &[&[3][..], &block, &padding].concat());
            assert_mended(PADDED | PRIORITY | 5, &[&[3][..], &priority, &block, &padding].concat());
            for (flags, payload) in [
                (PADDED, &[][..]),
                (PADDED, &[1]),
                (PADDED, &[3, 0x41, 0x01, b'/']),
                (PRIORITY, &[0x41, 0x01, b'/']),
                (PADDED | PRIORITY, &[0, 0, 0, 0]),
            ] {
                assert_eq!(mended(flags, payload), payload);
            }
        }
    }

    #[test]
    fn what_is_cut_off_or_too_long_is_left() {
        let mut whole = vec![0x83, 0x41];
        whole.extend(text(INVALID[1], true));
        for end in 0..whole.len() {
            assert_eq!(mended(0, &whole[..end]), whole[..end]);
        }
        assert_mended(0, &whole);
        for lead in [&[0x41, 0x7f][..], &[0x41, 0xff], &[0x7f], &[0x0f], &[0x1f], &[0x3f], &[0xff]]
        {
            for length in 0..12 {
                for last in [0x00, 0x01, 0x7f] {
                    let mut payload = lead.to_vec();
                    payload.extend(vec![0xff; length]);
                    payload.push(last);
                    assert_eq!(mended(0, &payload), payload);
                }
            }
        }
        // An empty one has no room for another.
        assert_eq!(mended(0, &[0x41, 0x00]), [0x41, 0x00]);
        assert_eq!(mended(0, &[0x41, 0x80]), [0x41, 0x80]);
    }

    #[test]
    fn the_filler_fits_any_length() {
        for symbols in 1..200usize {
            for length in (5 * symbols).div_ceil(8)..=symbols {
                let mut value = vec![0; length];
                encode_filler(&mut value, symbols);
                let decoded = decode(&value).expect("well formed");
                assert_eq!(decoded.len(), symbols);
                assert!(Authority::try_from(&decoded[..]).is_ok());
            }
        }
        // Longer than it would be plain.
        let odd = [&[0x41][..], &text("##[[", true)].concat();
        assert_eq!(mended(0, &odd), odd);
    }

    /// The library reads on in its tables as the client wrote them, and reads codes as they are here.
    #[test]
    fn the_library_stays_in_step() {
        let printable: String = (b' '..=b'~').filter(|&b| b != b'\\').map(char::from).collect();
        let printable = printable.trim_start();
        let frame = |stream: u8, payload: &[u8]| {
            let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
            frame.extend([1, 5, 0, 0, 0, stream]);
            frame.extend(mended(5, payload));
            frame
        };
        for (huffman, invalid) in [false, true].into_iter().flat_map(|h| INVALID.map(|i| (h, i))) {
            let mut first = block(invalid, huffman);
            first.extend([&[0x40, 0x01, b'p'][..], &text(printable, huffman)].concat());
            // A table with room for these four entries of 32 bytes and their text, and none more. All
            // are referred to afterwards: the oldest is :path.
            let texts = ":path/etcdserverpb.KV/Range:authorityteptrailers".len()
                + invalid.len()
                + printable.len();
            first.splice(0..0, integer(0x20, 5, 4 * 32 + texts));
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
            bytes.extend(frame(1, &first));
            bytes.extend(frame(3, &[0x83, 0x86, 0xc1, 0xc0, 0xbf, 0xbe]));
            let work = async {
                let (mut client, server) = tokio::io::duplex(1 << 16);
                tokio::io::AsyncWriteExt::write_all(&mut client, &bytes).await.expect("room");
                let mut connection = h2::server::handshake(server).await.expect("it is HTTP/2");
                for _ in 0..2 {
                    let (request, _respond) =
                        connection.accept().await.expect("a request").expect("a good one");
                    let authority = request.uri().authority().expect("an authority").as_str();
                    assert_eq!(authority.len(), invalid.len());
                    assert_eq!(request.uri().path(), "/etcdserverpb.KV/Range");
                    assert_eq!(request.headers()["te"], "trailers");
                    assert_eq!(request.headers()["p"], printable);
                }
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let bounded = async {
                let patience = std::time::Duration::from_secs(30);
                tokio::time::timeout(patience, work).await.expect("requests in time");
            };
            runtime.expect("a runtime starts").block_on(bounded);
        }
    }

    proptest! {
        /// Nothing that comes from the network brings it down, and nothing but the value changes.
        #[test]
        fn any_bytes_are_borne(
            flags in any::<u8>(),
            lead in prop::collection::vec(any::<u8>(), 0..12),
            name in prop::sample::select(vec![0x41u8, 0x01, 0x11, 0x40, 0x83]),
            rest in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let payload = [&lead[..], &[name], &rest].concat();
            let mended = mended(flags, &payload);
            prop_assert_eq!(mended.len(), payload.len());
            if mended != payload {
                let range = find(flags, &payload).expect("an authority").range;
                prop_assert_eq!(&mended[..range.start], &payload[..range.start]);
                prop_assert_eq!(&mended[range.end..], &payload[range.end..]);
                assert_mended(flags, &payload);
            }
        }

        #[test]
        fn any_text_is_mended_if_it_must(value in "[ -\\[\\]-~]{1,80}", huffman in any::<bool>()) {
            let payload = block(&value, huffman);
            prop_assert_eq!(&authority(0, &payload).0[..], value.as_bytes());
            let is_long = huffman && self::huffman(&value).len() > value.len();
            if Authority::try_from(value.as_str()).is_ok() || is_long {
                prop_assert_eq!(mended(0, &payload), payload);
            } else {
                assert_mended(0, &payload);
            }
        }
    }
}
