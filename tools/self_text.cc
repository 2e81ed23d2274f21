#include "tools/self_text.h"

#include <algorithm>
#include <iterator>
#include <random>
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
constexpr std::string_view kOpenings[] = {
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

}  // namespace

absl::StatusOr<std::vector<std::vector<int32_t>>> MakeUpTexts(
    ModelExecutor* executor, const Tokenizer& tokenizer, int count, int length, int batch,
    uint64_t seed, const std::function<bool(int64_t done, int64_t total)>& progress) {
  std::vector<std::vector<int32_t>> openings;
  for (const std::string_view text : kOpenings) {
    absl::StatusOr<std::vector<int32_t>> tokens =
        tokenizer.Encode(text, Tokenizer::Special::kParse);
    if (!tokens.ok()) return tokens.status();
    if (tokens->size() > kPieceTokens / 2) tokens->resize(kPieceTokens / 2);
    if (!tokens->empty()) openings.push_back(*std::move(tokens));
  }
  const int64_t total = int64_t{count} * length;
  const auto pieces = static_cast<int>((total + kPieceTokens - 1) / kPieceTokens);
  FixedPolicy dense(0);
  Engine engine({.max_batch_tokens = std::max(batch, 2 * kPieceTokens),
                 .max_sequences = batch,
                 .max_waiting = pieces,
                 .prefix_cache = false},
                executor->kv_geometry(), executor->ladder(), executor, &dense);
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> token(0, executor->config().vocabulary - 1);
  std::vector<std::vector<int32_t>> made(pieces);
  for (int i = 0, opening = 0; i < pieces; ++i) {
    made[i] = {token(random)};
    if (i % 4 != 0 && !openings.empty()) made[i] = openings[opening++ % openings.size()];
    Request request;
    request.id = i + 1;
    request.prompt = made[i];
    request.sampling.temperature = 1;
    request.sampling.seed = seed + static_cast<uint64_t>(i);
    request.stop.max_tokens = kPieceTokens - static_cast<int>(made[i].size());
    const absl::Status status = engine.Submit(std::move(request));
    if (!status.ok()) return status;
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
