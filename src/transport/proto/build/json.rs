//! Writes the JSON mapping of the client API's messages: one `impl Json` each, over `src/json`.

use std::collections::HashMap;
use std::fmt::Write;

use heck::{ToSnakeCase, ToUpperCamelCase};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet,
};

/// The files whose messages the JSON gateway carries.
const FILES: [&str; 5] = ["mvcc.proto", "auth.proto", "rpc.proto", "lock.proto", "election.proto"];
/// Made by hand, like its type.
const BY_HAND: &str = ".mvccpb.KeyValue";

/// The source of all impls.
pub fn generate(descriptors: &FileDescriptorSet) -> String {
    let mut enums = HashMap::new();
    let mut out = String::new();
    let files: Vec<_> =
        descriptors.file.iter().filter(|file| FILES.contains(&file.name())).collect();
    for file in &files {
        let scope = Scope::of(file);
        file.enum_type.iter().for_each(|e| scope.enumeration(e, &mut enums, &mut out));
        file.message_type.iter().for_each(|m| scope.enums_of(m, &mut enums, &mut out));
    }
    for file in &files {
        let scope = Scope::of(file);
        for message in &file.message_type {
            scope.message(message, &enums, &mut out);
        }
    }
    out
}

/// Where a type is declared: its full name in the files, and its path in Rust.
struct Scope {
    proto: String,
    rust: String,
}

impl Scope {
    fn of(file: &FileDescriptorProto) -> Self {
        Scope { proto: format!(".{}", file.package()), rust: format!("crate::{}", file.package()) }
    }

    fn inside(&self, message: &DescriptorProto) -> Self {
        Scope {
            proto: format!("{}.{}", self.proto, message.name()),
            rust: format!("{}::{}", self.rust, message.name().to_snake_case()),
        }
    }

    fn enums_of(
        &self,
        message: &DescriptorProto,
        enums: &mut HashMap<String, String>,
        out: &mut String,
    ) {
        let inside = self.inside(message);
        message.enum_type.iter().for_each(|e| inside.enumeration(e, enums, out));
        message.nested_type.iter().for_each(|m| inside.enums_of(m, enums, out));
    }

    /// A table of names, in the order of their numbers.
    fn enumeration(
        &self,
        found: &EnumDescriptorProto,
        enums: &mut HashMap<String, String>,
        out: &mut String,
    ) {
        let proto = format!("{}.{}", self.proto, found.name());
        let table = proto[1..].to_snake_case().to_uppercase().replace('.', "_");
        let names: Vec<_> = found.value.iter().map(|v| (v.name(), v.number())).collect();
        writeln!(out, "const {table}: &[(&str, i32)] = &{names:?};").unwrap();
        enums.insert(proto, table);
    }

    fn message(
        &self,
        message: &DescriptorProto,
        enums: &HashMap<String, String>,
        out: &mut String,
    ) {
        let inside = self.inside(message);
        message.nested_type.iter().for_each(|m| inside.message(m, enums, out));
        if format!("{}.{}", self.proto, message.name()) == BY_HAND {
            return;
        }
        let rust = format!("{}::{}", self.rust, message.name().to_upper_camel_case());
        let (mut write, mut read) = (String::new(), String::new());
        for (index, field) in message.field.iter().enumerate() {
            let name = field.name();
            let lower_camel = lower_camel(name);
            let spellings = if lower_camel == name {
                format!("{name:?}")
            } else {
                format!("{name:?} | {lower_camel:?}")
            };
            let kind = Kind::of(field, enums);
            match field.oneof_index {
                None => {
                    let place = format!("self.{}", rust_field(name));
                    writeln!(write, "{}", kind.write(name, &place)).unwrap();
                    writeln!(
                        read,
                        "{spellings} => if input.first(seen, {index}, name)? {{ {} }}",
                        kind.read(name, &place)
                    )
                    .unwrap();
                }
                Some(oneof) => {
                    let oneof = message.oneof_decl[oneof as usize].name();
                    let place = format!("self.{}", rust_field(oneof));
                    let variant = format!(
                        "{}::{}::{}",
                        inside.rust,
                        oneof.to_upper_camel_case(),
                        name.to_upper_camel_case()
                    );
                    writeln!(
                        write,
                        "if let Some({variant}(value)) = &{place} {{ {} }}",
                        kind.write_set(name)
                    )
                    .unwrap();
                    writeln!(
                        read,
                        "{spellings} => if input.first(seen, {index}, name)? {{ \
                            input.alone({place}.is_some(), {oneof:?}, name)?; \
                            {} {place} = Some({variant}(value)); }}",
                        kind.read_set()
                    )
                    .unwrap();
                }
            }
        }
        let body = match message.field.is_empty() {
            true => "let _ = (name, seen, input); Ok(false)".to_owned(),
            false => format!("match name {{ {read} _ => return Ok(false) }} Ok(true)"),
        };
        writeln!(
            out,
            "impl Json for {rust} {{\n\
                fn fields(&self, out: &mut Object<'_>) {{ let _ = &out; {write} }}\n\
                fn field(&mut self, name: &str, seen: &mut u64, input: &mut Input<'_>) \
                    -> Result<bool, Error> {{ {body} }}\n\
            }}"
        )
        .unwrap();
    }
}

/// How a field is written and read.
enum Kind {
    /// By the methods of this name.
    Plain(&'static str),
    Enum(String),
    Message,
    RepeatedMessage,
    Repeated(&'static str),
    RepeatedEnum(String),
}

impl Kind {
    fn of(field: &FieldDescriptorProto, enums: &HashMap<String, String>) -> Self {
        let repeated = field.label() == Label::Repeated;
        let method = match field.r#type() {
            Type::Message if repeated => return Kind::RepeatedMessage,
            Type::Message => return Kind::Message,
            Type::Enum => {
                let table = enums[field.type_name()].clone();
                return if repeated { Kind::RepeatedEnum(table) } else { Kind::Enum(table) };
            }
            Type::Bytes => "bytes",
            Type::String => "string",
            Type::Bool => "boolean",
            Type::Int64 => "int64",
            Type::Uint64 => "uint64",
            Type::Uint32 => "uint32",
            other => panic!("no JSON mapping for a field of type {other:?}"),
        };
        if repeated { Kind::Repeated(method) } else { Kind::Plain(method) }
    }

    /// Writes a field unless it has its default value.
    fn write(&self, name: &str, place: &str) -> String {
        match self {
            Kind::Plain("boolean") => {
                format!("if {place} {{ out.boolean({name:?}, true); }}")
            }
            Kind::Plain(method @ ("bytes" | "string")) => {
                format!("if !{place}.is_empty() {{ out.{method}({name:?}, &{place}); }}")
            }
            Kind::Plain(method) => {
                format!("if {place} != 0 {{ out.{method}({name:?}, {place}); }}")
            }
            Kind::Enum(table) => {
                format!("if {place} != 0 {{ out.enumeration({name:?}, {table}, {place}); }}")
            }
            Kind::Message => {
                format!("if let Some(value) = &{place} {{ out.message({name:?}, value); }}")
            }
            Kind::RepeatedMessage => format!("out.messages({name:?}, &{place});"),
            Kind::Repeated(method) => format!("out.list_of_{method}({name:?}, &{place});"),
            Kind::RepeatedEnum(table) => {
                format!("out.list_of_enumeration({name:?}, {table}, &{place});")
            }
        }
    }

    /// Writes a member of a oneof, `value`, whatever it is.
    fn write_set(&self, name: &str) -> String {
        match self {
            Kind::Plain(method @ ("bytes" | "string")) => {
                format!("out.{method}({name:?}, value);")
            }
            Kind::Plain(method) => format!("out.{method}({name:?}, *value);"),
            Kind::Enum(table) => format!("out.enumeration({name:?}, {table}, *value);"),
            Kind::Message => format!("out.message({name:?}, value);"),
            _ => panic!("a oneof has no lists"),
        }
    }

    /// Reads a member of a oneof into `value`.
    fn read_set(&self) -> String {
        match self {
            Kind::Plain(method) => format!("let value = input.{method}(name)?;"),
            Kind::Message => {
                "let mut value = Default::default(); input.message(&mut value)?;".to_owned()
            }
            _ => panic!("a oneof has no lists, and none here has an enum"),
        }
    }

    fn read(&self, name: &str, place: &str) -> String {
        match self {
            Kind::Plain(method) => format!("{place} = input.{method}(name)?;"),
            Kind::Enum(table) => {
                format!("if let Some(v) = input.enumeration(name, {table})? {{ {place} = v; }}")
            }
            Kind::Message => format!("input.message({place}.get_or_insert_default())?;"),
            Kind::RepeatedMessage => format!(
                "input.list(|input| {{ let mut item = Default::default(); \
                    input.message(&mut item)?; {place}.push(item); Ok(()) }})?;"
            ),
            Kind::Repeated(method) => {
                format!(
                    "input.list(|input| {{ {place}.push(input.{method}({name:?})?); Ok(()) }})?;"
                )
            }
            Kind::RepeatedEnum(table) => format!(
                "input.list(|input| {{ \
                    {place}.extend(input.enumeration({name:?}, {table})?); Ok(()) }})?;"
            ),
        }
    }
}

/// The second spelling of a name: what follows an underscore is upper case.
fn lower_camel(name: &str) -> String {
    let mut upper = false;
    let mut out = String::with_capacity(name.len());
    for letter in name.chars() {
        if letter == '_' {
            upper = true;
        } else if std::mem::take(&mut upper) {
            out.push(letter.to_ascii_uppercase());
        } else {
            out.push(letter);
        }
    }
    out
}

/// The name that the message compiler gives a field.
fn rust_field(name: &str) -> String {
    match name.to_snake_case().as_str() {
        "type" => "r#type".to_owned(),
        name => name.to_owned(),
    }
}
