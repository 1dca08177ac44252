//! The native module `pdrs._core`: registration only.

#![allow(clippy::needless_pass_by_value, reason = "PyO3 asks for owned arguments")]

mod archive;
mod bulk;
mod complete;
mod copy;
mod dlpack;
mod entries;
mod group;
mod huge_pages;
mod index_map;
mod instance;
mod interpreter;
mod lazy_bits;
mod lock;
mod mapped;
mod memory;
mod modules;
mod name;
mod names;
mod one_step;
mod row;
mod safetensors;
mod shards;
mod slab;
mod slots;
mod stable_abi;
mod stacked;
mod state;
mod table_rows;
mod tensor;
mod torch_own;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::archive::{apply_names, changed_rows, crc32, diff_names, has_packed, pack_names, unpack_names};
    #[pymodule_export]
    use super::bulk::{
        can_take_over, clear_entries, delete_entry, get_entry, in_step, insert_all, pop_end, pop_entry, prepare,
        save_parameters, set_entry, take_over, unzip,
    };
    #[pymodule_export]
    use super::complete::complete_move;
    #[pymodule_export]
    use super::entries::EntryIterator;
    #[pymodule_export]
    use super::group::{TensorGroup, group_tensors, slab_views};
    #[pymodule_export]
    use super::huge_pages::use_huge_pages;
    #[pymodule_export]
    use super::index_map::{IndexMap, NameIterator};
    #[pymodule_export]
    use super::lock::{Lock, Stay};
    #[pymodule_export]
    use super::mapped::map_over;
    #[pymodule_export]
    use super::modules::{all_kept, collect_parameters, walk_modules};
    #[pymodule_export]
    use super::one_step::in_one_step;
    #[pymodule_export]
    use super::row::{sort_tensors, zero_row, zero_row_of_state, zero_rows};
    #[pymodule_export]
    use super::safetensors::{
        SafetensorsHeader, SafetensorsStack, safetensors_entries, safetensors_header, safetensors_shards,
    };
    #[pymodule_export]
    use super::shards::{ShardIndex, shard_lines};
    #[pymodule_export]
    use super::slots::use_native_slots;
    #[pymodule_export]
    use super::stacked::{
        find_rows, insert_ids, missing_names, names_behind, pop_end_row, pop_row, remove_names, replace_ids, set_row,
    };
    #[pymodule_export]
    use super::state::{load_matching, not_copied_yet, place_copies, unexpected_keys};
    #[pymodule_export]
    use super::table_rows::TableRows;
    #[pymodule_export]
    use super::torch_own::{are_functions_own, is_own, watch_functions};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::huge_pages::keep_reserve();
        super::interpreter::require_main(module.py())
    }
}
