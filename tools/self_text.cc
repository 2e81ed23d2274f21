#include "tools/self_text.h"

#include <algorithm>
#include <iterator>
#include <random>
#include <span>
#include <string_view>
#include <utility>

#include "engine/engine.h"
#include "policy/policy.h"

namespace espalier {
namespace {

// Tokens of a piece, its opening among them. Of one random token and as much text in all, pieces of
// 64 lost less than those of a whole window.
constexpr int kPieceTokens = 64;

// What many kinds of text begin with.
constexpr std::string_view kBeginnings[] = {
    // prose
    "It was late in the evening when ",
    "The history of the city begins in the ",
    "= = Early life = = \n ",
    "\"I don't think so,\" she said. \"",
    "Chapter 3\n\n",
    "Dear Sir or Madam,\n\nI am writing to ",
    "LONDON (Reuters) - ",
    "Abstract. In this paper we ",
    "Review: I bought this product two weeks ago and ",
    "Ingredients:\n- 2 cups of ",
    "Once upon a time, ",
    "The film received generally ",
    "In mathematics, a ",
    "Q: How do I ",
    "Step 1: ",
    "Patients with a history of ",
    "The court held that ",
    "Shall I compare thee to ",
    // talk
    "<|im_start|>user\nWhat is ",
    "<|im_start|>user\nWrite a ",
    "<|im_start|>assistant\nHere is ",
    "<|im_start|>user\nExplain ",
    "User: Can you help me with ",
    "Interviewer: ",
    "<alice> hi, does anyone know ",
    // other languages
    "Le programme permet de ",
    "Les options suivantes sont ",
    "La ville de Paris est ",
    "Die Geschichte der ",
    "Diese Datei enth\u00e4lt ",
    "El presidente de la ",
    "Este libro trata de ",
    "Il comune di ",
    "A cidade de ",
    "De gemeente ",
    "\u0413\u043e\u0440\u043e\u0434 ",
    "\u65e5\u672c\u306e",
    // code
    "#include <stdio.h>\n\n",
    "#ifndef _LINUX_",
    "/* SPDX-License-Identifier: GPL-2.0 */\n#define ",
    "struct ",
    "static inline int ",
    "template <typename T>\nclass ",
    "import os\nimport sys\n\ndef ",
    "    def __init__(self, ",
    "class Test",
    "from __future__ import annotations\n\n",
    "\"\"\"Return the ",
    "public class Main {\n    ",
    "package main\n\nimport (\n\t\"fmt\"\n",
    "fn main() {\n    let ",
    "function render(",
    "const express = require('express');\n",
    "use strict;\nuse warnings;\n\nsub ",
    "=head1 NAME\n\n",
    "=item B<",
    "#!/bin/sh\nset -e\n\n",
    "SELECT id, name FROM ",
    "CREATE TABLE ",
    "cmake_minimum_required(VERSION 3.",
    "all: $(OBJS)\n\t$(CC) ",
    ";; Emacs Lisp\n(defun ",
    "module Data.List where\n\n",
    "diff --git a/src/main.c b/src/main.c\n",
    "    mov eax, ",
    // data and markup
    "{\n  \"name\": \"",
    "{\"id\": 1, \"type\": \"",
    "[{\"key\": ",
    "<!DOCTYPE html>\n<html>\n<head>\n",
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<",
    "name,date,value\n",
    "apiVersion: apps/v1\nkind: ",
    "[section]\nenabled = ",
    "# README\n\n## Installation\n\n",
    "| Name | Type | Description |\n|---|---|---|\n| ",
    "\\documentclass{article}\n\\begin{document}\n",
    "\\begin{equation}\n",
    "2021-03-04 12:01:33 INFO ",
    "Jan 12 04:11:09 localhost kernel: ",
    "127.0.0.1 - - [10/Oct/2020:13:55:36 +0000] \"GET /",
    "Traceback (most recent call last):\n  File \"",
    "https://www.",
    "From: John Smith <john@",
    "Subject: Re: ",
    "BEGIN:VCARD\nVERSION:3.0\n",
    "@article{",
    "1, 2, 3, 4, ",
    "0x00, 0x1f, 0x",
    "U+0041 LATIN ",
    // what comes with software
    "NAME\n       ls - list ",
    "Usage: program [OPTION]... ",
    "  -v, --verbose  ",
    "Copyright (C) 2015 Free Software Foundation, Inc.\n\n",
    "Redistribution and use in source and binary forms, ",
    "Permission is hereby granted, free of charge, ",
    "Files: *\nCopyright: 2010-2018 ",
    "Version 1.2.3 (2014-05-06)\n\n  * ",
    "package (1.0-2) unstable; urgency=low\n\n  * ",
    "  * Fix ",
    "2009-02-11  John Smith  <",
    "Package: lib",
    "msgid \"",
};

// What lies in the middle of text that is copied everywhere, which a model knows by heart: more of
// it, and nearly as it knows it.
constexpr std::string_view kCopied[] = {
    "THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR",
    "Redistribution and use in source and binary forms, with or without modification, are",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this",
    "This program is free software; you can redistribute it and/or modify it under the terms",
    "Licensed under the Apache License, Version 2.0 (the \"License\"); you may not use",
    "IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY",
    "GNU GENERAL PUBLIC LICENSE\n Version 2, June 1991\n\n Copyright (C) 1989, 1991",
    "You may convey a work based on the Program, or the modifications to produce it",
    "On Debian systems, the complete text of the GNU General Public License",
    "Subject to the terms and conditions of this License, each Contributor hereby grants",
    "Permission to use, copy, modify, and/or distribute this software for any purpose",
    "Files: *\nCopyright: 2010-2018 The authors\nLicense: GPL-2+\n",
};

// Prose as corpora have it, with words and signs apart. Such text wants longer pieces: alone, whole
// windows lost 0.57 where pieces of 64 lost 0.63.
constexpr std::string_view kTokenized[] = {
    " \n = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre actor "
    ".",
    " = = Reception = = \n \n The album received generally positive reviews from music critics , "
    "who",
    " = = = Early history = = = \n \n The first settlers arrived in the area in the 18th century ;",
    " The game was released in Japan on 12 May , and sold more than 1 @,@ 000 @,@ 000 copies",
    " In the 2010 \u2013 11 season , he scored 12 goals in 34 appearances , and was named",
    " The ship was laid down on 1 May 1911 at the <unk> shipyard , and commissioned in",
    " \" I was surprised by the response , \" he said . He added that it 's a",
    " = = Plot = = \n \n The episode begins with a man who discovers that his wife",
    " The species is found in eastern Australia , where it grows to 2 @.@ 5 metres ( 8 ft ) tall .",
    " The storm was first noted as a tropical wave on August 12 , about 300 miles ( 480 km )",
    " During the Second World War , the regiment was sent to North Africa , where it",
    " He wrote that the song 's lyrics were \" a mixture of",
    " The two armies met near the river on 12 April ; the French , under General",
    " The highway begins at an intersection with U.S. Route 12 and heads north @-@ east through",
};

struct Opening {
  std::vector<int32_t> tokens;
  int piece = kPieceTokens;
  float temperature = 1;
};

}  // namespace

absl::StatusOr<std::vector<std::vector<int32_t>>> MakeUpTexts(
    ModelExecutor* executor, const Tokenizer& tokenizer, int count, int length, int batch,
    uint64_t seed, const std::function<bool(int64_t done, int64_t total)>& progress) {
  std::vector<Opening> openings;
  absl::Status status;
  const auto open = [&](std::span<const std::string_view> texts, int piece, float temperature) {
    for (const std::string_view text : texts) {
      absl::StatusOr<std::vector<int32_t>> tokens =
          tokenizer.Encode(text, Tokenizer::Special::kParse);
      status.Update(tokens.status());
      if (!tokens.ok() || tokens->empty()) continue;
      if (static_cast<int>(tokens->size()) > piece / 2) tokens->resize(piece / 2);
      openings.push_back(
          {.tokens = *std::move(tokens), .piece = piece, .temperature = temperature});
    }
  };
  open(kBeginnings, kPieceTokens, 1);
  // No longer than a text, which the model's context holds.
  const int longest = std::max(kPieceTokens, length);
  open(kCopied, std::min(2 * kPieceTokens, longest), 0.6f);
  // Twice: of 64k tokens, 40 % of the channels left out, prose then loses 0.456 in place of 0.476,
  // mixed text 0.439 in place of 0.418.
  for (int i = 0; i < 2; ++i) open(kTokenized, std::min(3 * kPieceTokens, longest), 1);
  if (!status.ok()) return status;

  const int64_t total = int64_t{count} * length;
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> token(0, executor->config().vocabulary - 1);
  std::vector<Opening> pieces;
  int64_t planned = 0;
  for (size_t next = 0; planned < total; planned += pieces.back().piece) {
    if (pieces.size() % 4 == 0 || openings.empty()) {
      pieces.push_back({.tokens = {token(random)}});
    } else {
      pieces.push_back(openings[next++ % openings.size()]);
    }
  }
  FixedPolicy dense(0);
  Engine engine({.max_batch_tokens = std::max(batch, 2 * kPieceTokens),
                 .max_sequences = batch,
                 .max_waiting = static_cast<int>(pieces.size()),
                 .prefix_cache = false},
                executor->kv_geometry(), executor->ladder(), executor, &dense);
  std::vector<std::vector<int32_t>> made;
  for (size_t i = 0; i < pieces.size(); ++i) {
    made.push_back(pieces[i].tokens);
    Request request;
    request.id = i + 1;
    request.prompt = made[i];
    request.sampling.temperature = pieces[i].temperature;
    request.sampling.seed = seed + i;
    request.stop.max_tokens = pieces[i].piece - static_cast<int>(made[i].size());
    if (status = engine.Submit(std::move(request)); !status.ok()) return status;
  }
  int64_t done = 0;
  while (!engine.idle()) {
    const absl::StatusOr<const StepReport*> step = engine.Step(Instant{0});
    if (!step.ok()) return step.status();
    for (const SequenceOutput& output : (*step)->outputs) {
      for (const TokenResult& drawn : output.tokens) made[output.id - 1].push_back(drawn.token);
      done += static_cast<int64_t>(output.tokens.size());
    }
    if (!progress(done, total)) return absl::CancelledError("interrupted");
  }
  std::ranges::shuffle(made, random);
  std::vector<int32_t> all;
  for (const std::vector<int32_t>& piece : made) {
    all.insert(all.end(), piece.begin(), piece.end());
  }
  std::vector<std::vector<int32_t>> texts;
  for (int i = 0; i < count; ++i) {
    const auto begin = all.begin() + int64_t{i} * length;
    texts.emplace_back(begin, begin + length);
  }
  return texts;
}

}  // namespace espalier
