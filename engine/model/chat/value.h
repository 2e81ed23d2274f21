// What a template computes with: Python's values as far as templates can tell them apart.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "engine/model/chat/text.h"

namespace espalier::jinja {

class Value;
struct Macro;  // ast.h

using Items = std::vector<Value>;

// Order matters to nobody but Value::kind().
enum class Kind {
  kUndefined,
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kList,
  kTuple,
  kRange,
  kView,       // dict.items(), keys(), values(): has a length, cannot be indexed
  kGenerator,  // map, select, items: always true, no length, and gone once it was walked
  kDict,
  kNamespace,
  kLoop,
  kCallable,
};

// Lists and all that behave like them. Immutable but for a generator's end, as the sandbox of
// transformers makes them; so values cannot form cycles.
struct Sequence {
  Kind kind;
  Items items;
  int depth = 1;
  bool exhausted = false;
};

struct Dict {
  std::vector<std::pair<Value, Value>> entries;  // in order of insertion; few, so search is linear
  int depth = 1;
};

// The one mutable thing. It may hold itself, so the interpreter owns all of them.
struct Namespace {
  std::map<std::string, Value, std::less<>> attributes;
};

struct Loop {
  std::shared_ptr<const Items> items;
  size_t index0 = 0;
  int depth = 1;
};

// A macro, or something that has only a name: a function or a method that nobody calls here.
struct Callable {
  const Macro* macro = nullptr;
  std::string_view name;
};

class Value {
 public:
  struct Undefined {
    std::shared_ptr<const std::string> reason;  // "'x' is undefined"
  };
  struct None {};

  Value() = default;
  Value(None none) : data_(none) {}
  Value(bool b) : data_(b) {}
  Value(int64_t i) : data_(i) {}
  Value(double d) : data_(d) {}
  Value(Text text) : data_(std::make_shared<const Text>(std::move(text))) {}
  Value(Namespace* ns) : data_(ns) {}
  Value(std::shared_ptr<const Loop> loop) : data_(std::move(loop)) {}
  Value(Callable callable) : data_(callable) {}
  Value(const char*) = delete;  // would be a bool

  static Value String(std::string_view template_text) { return Value(Text(template_text)); }
  static Value MakeUndefined(std::string reason);
  // Fail when the value would be nested deeper than kMaxValueDepth.
  static Value Of(Kind sequence_kind, Items items);
  static Value List(Items items) { return Of(Kind::kList, std::move(items)); }
  static Value MakeDict(std::vector<std::pair<Value, Value>> entries_without_duplicates);

  Kind kind() const;
  bool Is(Kind k) const { return kind() == k; }
  bool IsUndefined() const { return Is(Kind::kUndefined); }
  bool IsString() const { return Is(Kind::kString); }
  bool IsSequence() const { return std::holds_alternative<std::shared_ptr<Sequence>>(data_); }
  bool IsInteger() const { return Is(Kind::kInt) || Is(Kind::kBool); }  // a bool is an int
  bool IsNumber() const { return IsInteger() || Is(Kind::kFloat); }

  const std::string& reason() const;  // of an undefined value
  bool boolean() const { return std::get<bool>(data_); }
  int64_t integer() const;  // also of a bool
  double number() const;    // of any number
  const Text& text() const { return *std::get<std::shared_ptr<const Text>>(data_); }
  std::string_view bytes() const { return text().bytes(); }
  Sequence& sequence() const { return *std::get<std::shared_ptr<Sequence>>(data_); }
  const Items& items() const { return sequence().items; }
  std::shared_ptr<const Items> shared_items() const;
  const Dict& dict() const { return *std::get<std::shared_ptr<const Dict>>(data_); }
  Namespace* ns() const { return std::get<Namespace*>(data_); }
  const Loop& loop() const { return *std::get<std::shared_ptr<const Loop>>(data_); }
  const Callable& callable() const { return std::get<Callable>(data_); }

  bool Truth() const;
  int Depth() const;              // 0 for what holds no other value
  std::string_view Noun() const;  // as error messages call it: "int object"

 private:
  std::variant<Undefined, None, bool, int64_t, double, std::shared_ptr<const Text>,
               std::shared_ptr<Sequence>, std::shared_ptr<const Dict>, Namespace*,
               std::shared_ptr<const Loop>, Callable>
      data_;
};

int OneDeeper(int depth);  // fails beyond kMaxValueDepth

}  // namespace espalier::jinja
