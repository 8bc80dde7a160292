// Every operator of torch.ops.hata, in the order in which one decoding step calls them.
// Arguments have the same names and order in the binding, the wrapper, the fake kernel and the
// reference: new data, weights, caches, block_table and cache_seqlens, then the settings.
// An operator's contract is the docstring of its wrapper, python/hata/ops/<operator>.py; its
// implementations register themselves in csrc/bindings/<operator>.cpp.

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(hata, m) {
  m.def("hash_encode(Tensor keys, Tensor key_weights, bool key_norms=False) -> (Tensor, Tensor)");

  m.def("encode_query(Tensor q, Tensor query_weights, int query_bits) -> Tensor");

  m.def(
      "cache_append(Tensor k, Tensor v, Tensor? key_weights, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor(c!)? code_cache, Tensor(d!)? norm_cache, Tensor block_table, "
      "Tensor cache_seqlens, Tensor? new_seqlens=None, *, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> ()");
  m.def(
      "cache_write(Tensor k, Tensor v, Tensor key_weights, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor(c!) code_cache, Tensor(d!)? norm_cache, Tensor slot_mapping, *, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> ()");

  m.def(
      "hamming_score(Tensor planes, Tensor code_cache, Tensor? norm_cache, Tensor block_table, "
      "Tensor cache_seqlens, int weight_sum, int max_seq_len) -> Tensor");

  m.def(
      "select_topk(Tensor scores, Tensor cache_seqlens, int top_k, int num_sink=0, "
      "int num_recent=0, float? top_k_share=None, int? min_top_k=None, bool return_cut=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "score_select(Tensor planes, Tensor code_cache, Tensor? norm_cache, Tensor block_table, "
      "Tensor cache_seqlens, int weight_sum, int top_k, int num_sink=0, int num_recent=0, "
      "float? top_k_share=None, int? min_top_k=None, bool return_cut=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "fetch_rows(Tensor indices, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "Tensor cache_seqlens, Tensor(a!) k_rows, Tensor(b!) v_rows, Tensor(c!) slot_of_row, "
      "Tensor(d!) position_of_slot, Tensor(e!) referenced, Tensor(f!) hand, *, Tensor(g!) slots, "
      "Tensor(h!) missing, Tensor(i!) num_missing) -> ()");

  m.def(
      "gather_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "Tensor cache_seqlens, Tensor indices, float? softmax_scale=None, float? softcap=None, *, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)");

  m.def(
      "dense_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "Tensor cache_seqlens, float? softmax_scale=None, float? softcap=None, "
      "int? min_sparse_len=None, *, Tensor? k_scale=None, Tensor? v_scale=None, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");

  m.def(
      "merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> (Tensor, Tensor)");

  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor key_weights, Tensor query_weights, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) code_cache, Tensor(d!)? norm_cache, "
      "Tensor block_table, Tensor cache_seqlens, int query_bits, int top_k, int num_sink=0, "
      "int num_recent=0, float? top_k_share=None, int? min_top_k=None, float? softmax_scale=None, "
      "float? softcap=None, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor(e!)? workspace=None, Tensor(f!)? last_score=None, Tensor(g!)? num_ties=None, *, "
      "Tensor(h!) indices, Tensor(i!) num_selected, Tensor(j!) out, Tensor(k!) lse) -> ()");

  // Bytes of workspace that decode_step needs.
  m.def(
      "workspace_size(int batch, int q_len, int num_heads, int num_kv_heads, int head_dim, "
      "int max_seq_len, int top_k) -> int");
}

// An empty module: importing hata._C loads this library, which registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
