#include "policy/ladder_file.h"

#include <charconv>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

namespace espalier {
namespace {

constexpr std::string_view kFirstLine = "espalier-ladder 1";

// What is before the first `separator`; *rest is what is behind it, or empty.
std::string_view Cut(std::string_view* rest, char separator) {
  const size_t at = rest->find(separator);
  const std::string_view piece = rest->substr(0, at);
  *rest = at == std::string_view::npos ? std::string_view() : rest->substr(at + 1);
  return piece;
}

// The next word; *rest begins behind it.
std::string_view Word(std::string_view* rest) {
  std::string_view word;
  while (word.empty() && !rest->empty()) word = Cut(rest, ' ');
  return word;
}

template <typename Number>
bool Read(std::string_view text, Number* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

std::string Quoted(std::string_view text) {
  constexpr size_t kMost = 40;  // a line may be a megabyte
  std::string quoted = "\"";
  quoted += text.substr(0, kMost);
  quoted += text.size() > kMost ? "...\"" : "\"";
  return quoted;
}

// Reads lines; after the first fault error() says what it is.
class Parser {
 public:
  bool Line(std::string_view line) {
    ++number_;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (number_ == 1) {
      return line == kFirstLine || Fail("expected " + Quoted(kFirstLine) + ", got " + Quoted(line));
    }
    std::string_view rest = line;
    const std::string_view noun = Word(&rest);
    if (noun.empty() || noun.starts_with('#')) return true;
    if (noun == "model") return ReadModel(rest);
    if (noun == "rung") return ReadRung(rest);
    return Fail("expected model, rung or #, got " + Quoted(noun));
  }

  // The ladder, once all lines are read; none if there is none.
  std::optional<Ladder> Take() {
    if (!ladder_) Fail(widths_ ? "the file has no rung" : "the file has no model line");
    return std::move(ladder_);
  }

  const std::string& error() const { return error_; }

 private:
  bool Fail(const std::string& what) {
    error_ = "line " + std::to_string(number_) + ": " + what;
    return false;
  }

  bool ReadCount(std::string_view key, std::string_view text, int least, int most, int* value) {
    if (Read(text, value) && *value >= least && *value <= most) return true;
    return Fail(std::string(key) + ": expected a number from " + std::to_string(least) + " to " +
                std::to_string(most) + ", got " + Quoted(text));
  }

  bool ReadModel(std::string_view rest) {
    if (widths_) return Fail("a second model line");
    SiteWidths widths;
    for (std::string_view value = Word(&rest); !value.empty(); value = Word(&rest)) {
      const std::string_view key = Cut(&value, '=');
      const bool layers = key == "layers", heads = key == "heads";
      if (!layers && !heads && key != "channels") {
        return Fail("expected layers=, heads= or channels=, got " + Quoted(key));
      }
      int* const to = layers ? &widths.layers : heads ? &widths.heads : &widths.channels;
      const int most = layers ? kMostLadderLayers : kMostLadderWidth;
      if (!ReadCount(key, value, 1, most, to)) return false;
    }
    if (widths.layers == 0 || widths.heads == 0 || widths.channels == 0) {
      return Fail("a model has layers=, heads= and channels=");
    }
    widths_ = widths;
    return true;
  }

  // "9*20,0*3,9*7" for the sites of a kind, into each of `profiles`.
  bool ReadCounts(std::string_view key, std::string_view text, SiteKind kind,
                  const std::vector<KeepProfile*>& profiles) {
    const int widest = kind == SiteKind::kHeads ? widths_->heads : widths_->channels;
    int layer = 0;
    while (!text.empty()) {
      std::string_view times = Cut(&text, ',');
      const std::string_view count = Cut(&times, '*');
      int kept = 0, layers = 1;
      if (!ReadCount(key, count, 0, widest, &kept)) return false;
      if (!times.empty() && !ReadCount(key, times, 1, kMostLadderLayers, &layers)) return false;
      if (layers > widths_->layers - layer) {
        return Fail(std::string(key) + ": more than " + std::to_string(widths_->layers) +
                    " layers");
      }
      for (const int end = layer + layers; layer < end; ++layer) {
        for (KeepProfile* profile : profiles) profile->Keep(layer, kind, kept);
      }
    }
    return layer == widths_->layers || Fail(std::string(key) + ": " + std::to_string(layer) +
                                            " of " + std::to_string(widths_->layers) + " layers");
  }

  bool ReadPrice(std::string_view key, std::string_view text, double* value) {
    if (Read(text, value) && std::isfinite(*value) && *value >= 0) return true;
    return Fail(std::string(key) + ": expected a finite number of at least 0, got " + Quoted(text));
  }

  bool ReadRung(std::string_view rest) {
    if (!widths_) return Fail("a rung before the model line");
    const int index = ladder_ ? ladder_->size() : 0;
    int told = 0;
    if (!ReadCount("rung", Word(&rest), 0, kMostRungs - 1, &told)) return false;
    if (told != index) {
      return Fail("expected rung " + std::to_string(index) + ", got " + std::to_string(told));
    }
    Rung rung{KeepProfile::Dense(*widths_), KeepProfile::Dense(*widths_), PriceTag{}};
    const std::pair<std::string_view, double*> prices[] = {
        {"loss", &rung.price.quality_loss_nats},
        {"prefill_us", &rung.price.prefill_us_per_token},
        {"decode_us", &rung.price.decode_us_per_row},
        {"kv_bytes", &rung.price.kv_bytes_per_token}};
    for (std::string_view value = Word(&rest); !value.empty(); value = Word(&rest)) {
      const std::string_view key = Cut(&value, '=');
      double* price = nullptr;
      for (const auto& [name, to] : prices) {
        if (key == name) price = to;
      }
      if (price != nullptr) {
        if (!ReadPrice(key, value, price)) return false;
        continue;
      }
      if (key == "kv") {
        if (value != "int4") return Fail("kv: expected int4, got " + Quoted(value));
        rung.int4_kv = true;
        continue;
      }
      const bool prefill = key.starts_with("prefill."), decode = key.starts_with("decode.");
      std::string_view site = key;
      if (prefill || decode) Cut(&site, '.');
      if (site != "heads" && site != "channels") return Fail("unknown key " + Quoted(key));
      std::vector<KeepProfile*> profiles;
      if (!decode) profiles.push_back(&rung.prefill);
      if (!prefill) profiles.push_back(&rung.decode);
      const SiteKind kind = site == "heads" ? SiteKind::kHeads : SiteKind::kChannels;
      if (!ReadCounts(key, value, kind, profiles)) return false;
    }
    return Append(std::move(rung));
  }

  bool Append(Rung rung) {
    if (!ladder_) {
      if (!rung.prefill.dense() || !rung.decode.dense() || rung.int4_kv ||
          rung.price.quality_loss_nats != 0) {
        return Fail("rung 0 keeps everything and loses nothing");
      }
      ladder_ = Ladder::DenseOnly(*widths_, rung.price);
      return true;
    }
    return ladder_->Append(std::move(rung)) || Fail("rung " + std::to_string(ladder_->size()) +
                                                    " keeps more of a site, or of K and V, than "
                                                    "the one before");
  }

  int number_ = 0;
  std::string error_;
  std::optional<SiteWidths> widths_;
  std::optional<Ladder> ladder_;
};

std::string Number(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof(text), value).ptr);
}

std::string RunsOf(const KeepProfile& profile, SiteKind kind) {
  std::string text;
  const int layers = profile.widths().layers;
  for (int layer = 0, end; layer < layers; layer = end) {
    const int kept = profile.kept(layer, kind);
    for (end = layer + 1; end < layers && profile.kept(end, kind) == kept;) ++end;
    if (!text.empty()) text += ',';
    text += std::to_string(kept);
    text += '*';
    text += std::to_string(end - layer);
  }
  return text;
}

}  // namespace

bool ParseLadder(std::string_view text, Ladder* ladder, std::string* error) {
  Parser parser;
  do {
    if (!parser.Line(Cut(&text, '\n'))) {
      *error = parser.error();
      return false;
    }
  } while (!text.empty());
  std::optional<Ladder> read = parser.Take();
  if (!read) {
    *error = parser.error();
    return false;
  }
  *ladder = *std::move(read);
  return true;
}

std::string FormatLadder(const Ladder& ladder, std::string_view comment) {
  const SiteWidths& widths = ladder.rung(0).prefill.widths();
  std::string text = std::string(kFirstLine) + "\n";
  while (!comment.empty()) text += "# " + std::string(Cut(&comment, '\n')) + "\n";
  text += "model layers=" + std::to_string(widths.layers) +
          " heads=" + std::to_string(widths.heads) +
          " channels=" + std::to_string(widths.channels) + "\n";
  for (int i = 0; i < ladder.size(); ++i) {
    const Rung& rung = ladder.rung(i);
    text += "rung " + std::to_string(i) + " loss=" + Number(rung.price.quality_loss_nats) +
            " prefill_us=" + Number(rung.price.prefill_us_per_token) +
            " decode_us=" + Number(rung.price.decode_us_per_row) +
            " kv_bytes=" + Number(rung.price.kv_bytes_per_token) + (rung.int4_kv ? " kv=int4" : "");
    for (const SiteKind kind : {SiteKind::kHeads, SiteKind::kChannels}) {
      const std::string name = kind == SiteKind::kHeads ? "heads=" : "channels=";
      const std::string whole = RunsOf(ladder.rung(0).prefill, kind);
      const std::string prefill = RunsOf(rung.prefill, kind), decode = RunsOf(rung.decode, kind);
      if (prefill == decode) {
        if (prefill != whole) text += " " + name + prefill;
        continue;
      }
      if (prefill != whole) text += " prefill." + name + prefill;
      if (decode != whole) text += " decode." + name + decode;
    }
    text += "\n";
  }
  return text;
}

}  // namespace espalier
