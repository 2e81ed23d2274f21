#include "tools/scatter.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

constexpr double kWidth = 640, kHeight = 420, kLeft = 70, kRight = 20, kTop = 40, kBottom = 55;

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else {
      out += c;
    }
  }
  return out;
}

// From zero to a round number beyond the largest, in four to ten steps.
struct Axis {
  double end = 1, step = 0.25;

  explicit Axis(double largest) {
    if (!(largest > 0)) return;
    const double decade = std::pow(10, std::floor(std::log10(largest)));
    for (const double part : {0.1, 0.2, 0.25, 0.5, 1.0}) {
      step = part * decade;
      end = step * std::ceil(1.05 * largest / step);
      if (end / step <= 10) break;
    }
  }
};

}  // namespace

std::string ScatterSvg(std::span<const ScatterPoint> points, const std::string& title,
                       const std::string& x_title, const std::string& y_title) {
  double most_x = 0, most_y = 0;
  for (const ScatterPoint& point : points) {
    most_x = std::max(most_x, point.x);
    most_y = std::max({most_y, point.y + point.error, point.told});
  }
  const Axis x_axis(most_x), y_axis(most_y);
  const auto x_of = [&](double x) {
    return kLeft + (kWidth - kLeft - kRight) * std::max(0.0, x) / x_axis.end;
  };
  const auto y_of = [&](double y) {
    return kHeight - kBottom - (kHeight - kTop - kBottom) * std::max(0.0, y) / y_axis.end;
  };
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
      kWidth, kHeight);
  const auto text = [&](double x, double y, const char* anchor, const std::string& what,
                        const char* more = "") {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\"{}>{}</text>\n", x, y,
                       anchor, more, Escaped(what));
  };
  const auto line = [&](double x1, double y1, double x2, double y2, const char* color) {
    svg += fmt::format(
        "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\"/>\n", x1, y1,
        x2, y2, color);
  };
  for (int i = 0; i * x_axis.step <= 1.001 * x_axis.end; ++i) {
    const double x = i * x_axis.step;
    line(x_of(x), y_of(0), x_of(x), y_of(y_axis.end), "#ddd");
    text(x_of(x), y_of(0) + 16, "middle", fmt::format("{:.4g}", x));
  }
  for (int i = 0; i * y_axis.step <= 1.001 * y_axis.end; ++i) {
    const double y = i * y_axis.step;
    line(x_of(0), y_of(y), x_of(x_axis.end), y_of(y), "#ddd");
    text(x_of(0) - 6, y_of(y) + 4, "end", fmt::format("{:.4g}", y));
  }
  for (const ScatterPoint& point : points) {
    const double x = x_of(point.x);
    line(x, y_of(point.y - point.error), x, y_of(point.y + point.error), "#1f77b4");
    svg += fmt::format(
        "<circle cx=\"{0:.1f}\" cy=\"{1:.1f}\" r=\"4\" fill=\"none\" stroke=\"#888\"/>\n"
        "<circle cx=\"{0:.1f}\" cy=\"{2:.1f}\" r=\"4\" fill=\"#1f77b4\"/>\n",
        x, y_of(point.told), y_of(point.y));
    text(x + 8, y_of(point.y) - 6, "start", point.label);
  }
  text(kWidth / 2, 22, "middle", title, " font-size=\"14\"");
  text((kLeft + kWidth - kRight) / 2, kHeight - 14, "middle", x_title);
  svg += fmt::format(
      "<text transform=\"translate(18 {:.1f}) rotate(-90)\" "
      "text-anchor=\"middle\">{}</text>\n",
      (kTop + kHeight - kBottom) / 2, Escaped(y_title));
  return svg + "</svg>\n";
}

}  // namespace espalier
