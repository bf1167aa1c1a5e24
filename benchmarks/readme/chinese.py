"""The words of the measured tables in Chinese. Figures, names and versions pass through as they are."""

from __future__ import annotations

import re

# (pattern in the English tables, Chinese), in this order. tests/test_tables.py finds what is out of date or missing.
WORDS = [
    (r"refused by the gate", "被门禁拒绝"),
    (r"\*\*not measured\*\* yet: (`[^`]+`) measures\.", r"**尚未测量**：用 \1 测量。"),
    (r"What the planner chooses for rows of 512 tokens, 16 a step, rank 16, and the peak of a step; the device holds that "
     r"and a reserve\.",
     "每行 512 个 token、每步 16 行、秩 16 时计划的选择，以及一步的峰值；设备要装下峰值和余量。"),
    (r"LLaMA in QLoRA, one row of 512 tokens, recomputed; GB are 10⁹ bytes\. The paper's figures \((\[[^ ]+ [^ ]+\))\) are "
     r"partly estimates\. What is trained is float32 here, (\d+) bytes a weight of the adapter, as many of its gradient and "
     r"twice that of its optimiser state: the adapter and its gradient in 16 bit would save ([\d.]+) GB at 65B\. With the "
     r"reserve, 65B at r=16 fits a device of ([\d.]+) GiB \(([\d.]+) GB\)\.",
     r"LLaMA 的 QLoRA，一行 512 个 token，重算；GB 为 10⁹ 字节。论文的数字（\1）有一部分是估计。这里凡是训练的都是 float32：适配器每个"
     r"权重 \2 字节，梯度同样多，优化器状态两倍；适配器和梯度若用 16 位，65B 可少 \3 GB。算上余量，秩 16 的 65B 装得进 \4 GiB（\5 GB）的设备。"),
    (r"QLoRA's paper, r=(\d+)", r"QLoRA 论文，r=\1"),
    (r"– base in 4 bits, its constants", "– 4 位基座及其常数"),
    (r"– adapter, its gradients and optimiser state", "– 适配器及其梯度、优化器状态"),
    (r"– activations and buffers", "– 激活值与缓冲区"),
    (r"GPT-3 with adapters on queries, keys and values, one matrix here: as many weights as the paper's on queries and values "
     r"\((\[[^ ]+ [^ ]+\)), section 4\.2\)\. One row of 2,048 tokens, recomputed\. Its weights alone take (\d+) GB in 16 bit "
     r"and (\d+) GB in 4\.",
     r"GPT-3，适配器加在 query、key、value 上（这里是同一个矩阵，适配器权重与论文的 query 加 value 一样多：\1，4.2 节）。一行 2,048 个 token，重算。"
     r"单是权重，16 位就要 \2 GB，4 位要 \3 GB。"),
    (r"\| GPT-3, 175B \| trains \| share \| memory of a step \|", "| GPT-3，175B | 训练参数 | 占比 | 一步的内存 |"),
    (r"planned: all weights", "计划：全部权重"),
    (r"planned: (Q?LoRA), r=", r"计划：\1，r="),
    (r"planned, r=", "计划，r="),
    (r"LoRA's paper, r=1 to 8 \| 4\.7 M to 37\.7 M", "LoRA 论文，r=1 至 8 | 4.7 M 至 37.7 M"),
    (r"often said of LoRA", "常见的说法"),
    (r"Memory of a training step on a CPU, predicted from the configuration alone, against what was measured: rows of 1 × 512, "
     r"16 short and 2 × 1,024 tokens, with and without recomputing\. step: the most that tensors and kernels hold at a time\. "
     r"process: what its resident set grows by, gaps between tensors included\. ",
     "CPU 上一个训练步的内存，只凭配置预测，与实测相比：1 × 512、16 行短文本、2 × 1,024 个 token，各有重算与不重算两种。“步”指张量与内核"
     "同时占用的最大值；“进程”指常驻内存的增长，包括张量之间的空隙。"),
    (r"\| method \| model \| cells \| step: median error \| largest \| process: median error \| largest \|",
     "| 方法 | 模型 | 组数 | 步：误差中位数 | 最大 | 进程：误差中位数 | 最大 |"),
    (r"Time of the same steps, predicted from rates that this machine took (\d+) s to measure, in turns with "
     r"these steps and in none of them\. ",
     r"同样这些训练步的时间，由用 \1 秒测得的本机速率预测；测速率与运行这些步交替进行，但不使用其中任何一步。"),
    (r"Cells: 1 × 512, 16 short, 2 × 1024\. ", "各组：1 × 512、16 行短文本、2 × 1024。"),
    (r"Time of the same steps, ", "同样这些训练步的时间："),
    (r"\| method \| model \| cells \| measured \| median error \| largest \|", "| 方法 | 模型 | 组数 | 实测 | 误差中位数 | 最大 |"),
    (r"([\d.]+) to ([\d.]+) s \|", r"\1 至 \2 秒 |"),
    (r"\| full \|", "| 全参数 |"),
    (r"\| held-out loss after training \| difference to 16 bit, paired \(95 %\) \|", "| 训练后的验证损失 | 与 16 位之差（配对，95 %） |"),
    (r"After one epoch over 2,000 rows: nats a token of ([\d,]+) test rows, each row's loss the mean over the seeds \((\d+)\)\. ",
     r"在 2,000 行上训练一个 epoch 之后：\1 行测试数据上的损失，单位 nat/token，每行取各种子（\2 个）的平均。"),
    (r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)", r"\1（\2 至 \3）"),
    (r"The server under load: ", "负载下的服务："),
    (r"SmolLM2-135M-Instruct in (\w+), adapters of rank 16 on all linear layers, answers of 64 tokens\. ?",
     r"SmolLM2-135M-Instruct，\1，所有线性层加秩 16 的适配器，每个回答 64 个 token。"),
    (r"\| with \| load \| tokens/s \| 8 adapters at once, compared with it \| first token, median \|",
     "| 工具 | 负载 | token/s | 8 个适配器同时服务，与之相比 | 首个 token，中位数 |"),
    (r"A trained adapter in vLLM's server: ([\d,]+) of ([\d,]+) greedy answers are the same, the log-probabilities of their "
     r"([\d,]+) common tokens ([\d.]+) nats apart on average",
     r"训练好的适配器放进 vLLM 的服务：\2 个贪心回答中 \1 个相同，共同的 \3 个 token 的对数概率平均相差 \4 nat"),
    (r"; where answers part, a server preferred its token by ([\d.]+) nats at most\.",
     r"；回答分岔处，服务对自己所选 token 的偏好最多 \1 nat。"),
    (r"\*\*twinlora\*\*'s server", "**twinlora** 的服务"),
    (r"vLLM's server", "vLLM 的服务"),
    (r"llama\.cpp's server \(F16\)", "llama.cpp 的服务（F16）"),
    (r"in one process", "单个进程内"),
    (r"base, 8 clients", "基座，8 个客户端"),
    (r"one adapter, 8 clients", "一个适配器，8 个客户端"),
    (r"8 adapters, 8 clients", "8 个适配器，8 个客户端"),
    (r"one adapter, one client", "一个适配器，一个客户端"),
    (r"llama\.cpp Q4_0, base, batch of 8", "llama.cpp Q4_0，基座，8 路并行"),
    (r"twinlora, batch of 8", "twinlora，8 路并行"),
    (r"transformers \+ PEFT, one \|", "transformers + PEFT，单路 |"),
    (r" \((\d+) requests failed\)", r"（\1 个请求失败）"),
    (r"Switching: one client, one token a request, in (\w+), adapters of rank 8 on queries and values \(([\d.]+) MB each\)\. "
     r"Serving ([\d,]+) of them, the process grew by (-?\d+) MB\. ?",
     r"切换：一个客户端，每个请求一个 token，\1，query 与 value 上秩 8 的适配器（每个 \2 MB）。服务 \3 个适配器期间，进程内存增长 \4 MB。"),
    (r"\| a request for, milliseconds \|", "| 请求的适配器，毫秒 |"),
    (r"\| adapter of the request before \|", "| 与上一个请求相同 |"),
    (r"\| another one, in memory \|", "| 另一个，在内存中 |"),
    (r"\| one that is on disk alone \|", "| 只在磁盘上的一个 |"),
    (r"\| any of ([\d,]+) \|", r"| \1 个中的任意一个 |"),
    (r"Mix-ups: ([\d,]+) of ([\d,]+) answers, from (\d+) adapters that each say their own code word, while names were loaded, "
     r"replaced and unloaded\.",
     r"串答：\3 个适配器各说自己的暗号，名字同时被加载、替换、卸载；\2 个回答中有 \1 个串了。"),
    (r"Abuse: in (\d+) minutes of clients that leave, malformed and oversized requests and bad adapters, ([\d,]+) of ([\d,]+) "
     r"answers were errors of the server; it ended “(\w+)”, its memory ([+-][\d.]+ %) between the middle and the last third\.",
     r"滥用：\1 分钟里客户端中途离开、请求残缺或过大、适配器损坏；\3 个回答中有 \2 个是服务器错误；结束时状态为“\4”，内存从中间三分之一到"
     r"最后三分之一变化 \5。"),
    (r"Adapters trained on banking77, exported, and asked in the program that each form is for\. held-out loss: nats a token of "
     r"the right answers; KL: from the trained model, nats\. ",
     "在 banking77 上训练的适配器，导出后在各自的程序里作答。验证损失：标准答案的 nat/token；KL：相对训练出的模型，单位 nat。"),
    (r"SmolLM2-135M-Instruct, ([\d,]+) rows, rank 16 on all linear layers; (\d+) test rows\. ",
     r"SmolLM2-135M-Instruct，\1 行训练数据，所有线性层加秩 16 的适配器；\2 行测试数据。"),
    (r"\| shipped as \| MB \| LoRA: exact match \| held-out loss \| KL \| QLoRA, into its dequantised base: exact match \| "
     r"held-out loss \| KL \|",
     "| 交付形式 | MB | LoRA：完全匹配率 | 验证损失 | KL | QLoRA，并入反量化的基座：完全匹配率 | 验证损失 | KL |"),
    (r"\| adapter, in twinlora \|", "| 适配器，在 twinlora 中 |"),
    (r"`, QLoRA's into 16 bit \|", "`，QLoRA 并入 16 位基座 |"),
    (r"\| LoRA in Q4_0 \| exact match \| held-out loss \| KL \| exact match by seed \|",
     "| LoRA，Q4_0 | 完全匹配率 | 验证损失 | KL | 各种子的完全匹配率 |"),
    (r"\| merged, then quantised \|", "| 先合并，再量化 |"),
    (r"\| in llama\.cpp \| file, MB \| peak memory, MB \| tokens/s read \| tokens/s written \|",
     "| 在 llama.cpp 中 | 文件，MB | 峰值内存，MB | 读入 token/s | 写出 token/s |"),
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
    (r"\| hybrid(?=[ ,])", "| 混合"),
    (r"(MB \| [\d.]+) \(([\d.]+) to ([\d.]+)\)", r"\1（\2 至 \3）"),
    (r", (\d+) threads?, (\d+) GiB; ([^\n]*)\.$", r"，\1 线程，\2 GiB；\3。"),
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
    """The tables with Chinese words."""
    out = dict(tables)
    for pattern, chinese in WORDS:
        out = {name: re.sub(pattern, chinese, text, flags=re.MULTILINE) for name, text in out.items()}
    return out
