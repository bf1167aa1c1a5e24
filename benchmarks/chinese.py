"""The words of the measured tables in Chinese. Figures, names and versions pass through as they are."""

from __future__ import annotations

import re

# (pattern in the English tables, Chinese), in this order. A pattern that matches nothing is out of date: an error.
WORDS = [
    (r"A training step of the llama-8B shape, random weights, rank 16 on all linear layers, rows of 2,048 tokens; "
     r"tokens/s\. recomputed: with `--gradient-checkpointing`\. ",
     "llama-8B 形状（随机权重）的训练步，所有线性层加秩 16 的适配器，每行 2,048 个 token；单位 token/s。“重算”指使用 "
     "`--gradient-checkpointing`。"),
    (r"No device has been at hand yet: `python benchmarks/gpu.py` measures\.",
     "尚无可用的设备：用 `python benchmarks/gpu.py` 测量。"),
    (r"\| tokens a step \| LoRA: tokens/s \| share of the GEMM rate \| QLoRA: tokens/s \| QLoRA's step / LoRA's \|",
     "| 每步 token 数 | LoRA：token/s | 占 GEMM 速率 | QLoRA：token/s | QLoRA 步时 / LoRA 步时 |"),
    (r"([\d,]+), recomputed \|", r"\1，重算 |"),
    (r"\| QLoRA, one row of 512 tokens, recomputed \| peak memory \| tokens/s \|", "| QLoRA，每步一行 512 个 token，重算 | 峰值显存 | token/s |"),
    (r"\| (\d+B) within (\d+) GB \|", r"| \1，\2 GB 以内 |"),
    (r"\| share of the copy rate \| speed over bitsandbytes \|", "| 占复制速率 | 速度为 bitsandbytes 的倍数 |"),
    (r"\*\*not measured\*\*", "**未测量**"),
    (r"A training step, SmolLM2-135M, rank 16 on all linear layers; medians of steps taken in turn\. Tokens are real "
     r"ones, without padding; all of the 2 × 512 carry loss, of banking77's the answers\. ",
     "SmolLM2-135M 的训练步，所有线性层加秩 16 的适配器；各方案轮流执行，取中位数。只计真实 token，不计填充；2 × 512 的全部 token "
     "参与损失，banking77 只有答案参与。"),
    (r"SmolLM2-135M-Instruct on banking77 \(77 intents, written out\): 2,000 rows, one epoch, rank 16 on all linear "
     r"layers, learning rate 1e-3, batch 16, identical initial adapters and order of rows, 1,500 test rows\. The "
     r"interval is that of the rows; runs that differ only in the initial adapter scatter as shown by seed\. ",
     "SmolLM2-135M-Instruct 在 banking77（77 种意图，以文字作答）上：2,000 行训练数据，一个 epoch，所有线性层加秩 16 的适配器，"
     "学习率 1e-3，批大小 16，初始适配器与行序完全相同，1,500 行测试数据。区间来自测试行；仅初始适配器不同的几次训练之间的差异见“各种子”一列。"),
    (r"SmolLM2-135M-Instruct on banking77: 1,000 rows, one epoch, rank 16 on all linear layers, batch 16, 1,000 test "
     r"rows, three seeds\. Each way has its own learning rate, doubled or halved as long as the loss on 200 other rows "
     r"fell\. ",
     "SmolLM2-135M-Instruct 在 banking77 上：1,000 行训练数据，一个 epoch，所有线性层加秩 16 的适配器，批大小 16，1,000 行测试数据，"
     "三个随机种子。每种方式用自己的学习率：只要另外 200 行上的损失还在下降，就加倍或减半。"),
    (r"\| way \| trains \| learning rate \| held-out loss \| exact match \| difference to LoRA, paired \(95 %\) \| by seed \|",
     "| 方式 | 训练参数 | 学习率 | 验证损失 | 完全匹配率 | 与 LoRA 之差（配对，95 %） | 各种子 |"),
    (r"LoRA\+, ratio (\d+)", r"LoRA+，比率 \1"),
    (r"QLoRA, LoftQ", "QLoRA，LoftQ"),
    (r"\| all weights \|", "| 全部权重 |"),
    (r"A random 7B llama \(32 layers of 4,096\) in NF4, rank 16 on all linear layers, one row of 256 tokens a step: it "
     r"trains within ([\d.]+) GiB, (\d+) s a step\. ",
     r"随机初始化的 7B llama（32 层，宽 4,096），NF4 基座，所有线性层加秩 16 的适配器，每步一行 256 个 token："
     r"训练内存不超过 \1 GiB，每步 \2 秒。"),
    (r"SmolLM2-135M-Instruct on banking77: Kullback-Leibler divergence of the next-token distributions from the 16-bit "
     r"base, nats a token, over all tokens of (\d+) held-out rows\. Embeddings, a fifth of this model, stay in 16 bit: at "
     r"4 bits the linear layers take (\d+) % less than in 16 bit, the whole model (\d+) % less\. Its weights were rounded "
     r"to 4 bits once before they were published here, so differences are understated\. ",
     r"SmolLM2-135M-Instruct 在 banking77 上：下一 token 分布相对 16 位基座的 KL 散度，单位为 nat/token，取 \1 行留出数据的全部 "
     r"token。嵌入占该模型的五分之一，保持 16 位：4 位时线性层比 16 位小 \2 %，整个模型小 \3 %。这份权重此前已被舍入到 4 位一次，因此差异偏小。"),
    (r"\| base \| bits per weight: linear layers \| whole model \| size \| divergence before training \(95 % interval\) \|",
     "| 基座 | 每权重位数：线性层 | 整个模型 | 大小 | 训练前的散度（95 % 区间） |"),
    (r"\| all ([a-z0-9-]+) \|", r"| 全部 \1 |"),
    (r"\| hybrid \|", "| 混合 |"),
    (r"(MB \| [\d.]+) \(([\d.]+) to ([\d.]+)\)", r"\1（\2 至 \3）"),
    (r", (\d+) threads?, (\d+) GiB; ([^\n]*)\.$", r"，\1 线程，\2 GiB；\3。"),
    (r"What the planner chooses for rows of 512 tokens, 16 a step, rank 16, and the peak of a step\. With one row a step "
     r"65B in QLoRA fits from ([\d.]+) GiB on \(peak ([\d.]+) GB and the reserve\)\.",
     r"每行 512 个 token、每步 16 行、秩 16 时计划的选择，以及一步的峰值。每步一行时，65B 用 QLoRA 从 \1 GiB 起装得下（峰值 \2 GB 加余量）。"),
    (r"\| model \|", "| 模型 |"),
    (r"nothing fits", "都装不下"),
    (r"\| method \| with \|", "| 方法 | 工具 |"),
    (r"2 × 512 tokens: tokens/s", "2 × 512 个 token：token/s"),
    (r"banking77, batches of 16: tokens/s", "banking77，批大小 16：token/s"),
    (r"peak memory", "峰值内存"),
    (r"PEFT, tuned by hand", "PEFT，手工调优"),
    (r"bitsandbytes, tuned by hand", "bitsandbytes，手工调优"),
    (r"greedy decoding, tokens/s \| one stream \| batch of 8", "贪心解码，token/s | 单路 | 8 路并行"),
    (r"exact match \(95 % interval\) \| difference to PEFT, paired \| by seed",
     "完全匹配率（95 % 区间） | 与 PEFT 之差（配对） | 各种子"),
    (r"([+-][\d.]+) points \(([+-][\d.]+) to ([+-][\d.]+)\)", r"\1 个百分点（\2 至 \3）"),
    (r"([\d.]+ %) \(([\d.]+) to ([\d.]+)\)", r"\1（\2 至 \3）"),
    (r"\| one (\d+ × \d+) weight \| milliseconds \|", r"| 一个 \1 的权重 | 毫秒 |"),
    (r"\| copy \|", "| 复制 |"),
    (r"\| dequantize \|", "| 反量化 |"),
    (r"\| quantize \|", "| 量化 |"),
    (r"twinlora, into a buffer", "twinlora（写入已有缓冲区）"),
    (r"forward and input gradient, (\d+) rows", r"前向与输入梯度，\1 行"),
    (r"decode, (\d+) rows", r"解码，\1 行"),
]  # fmt: skip


def translated(tables: dict[str, str]) -> dict[str, str]:
    """The tables with Chinese words. Raises SystemExit for words that no table has any more."""
    stale = [pattern for pattern, _ in WORDS if not any(re.search(pattern, t, re.MULTILINE) for t in tables.values())]
    if stale:
        raise SystemExit("chinese.py translates what no table says; correct it there:\n  " + "\n  ".join(stale))
    out = dict(tables)
    for pattern, chinese in WORDS:
        out = {name: re.sub(pattern, chinese, text, flags=re.MULTILINE) for name, text in out.items()}
    return out
